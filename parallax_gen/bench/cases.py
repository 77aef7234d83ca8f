"""What `bench` goes through: the shapes, who is timed at each, what the card cannot hold, and what is known already."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import click

from parallax_gen.bench.baselines import BASELINES, OURS, baselines_of
from parallax_gen.bench.rows import Conditions, Effort, Ledger, Row
from parallax_gen.cli.lengths import Lengths
from parallax_gen.cli.options import Sizes
from parallax_gen.cli.tables import title
from parallax_gen.cli.text import console
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import work_of
from parallax_gen.problem.workloads import SWEEPS, TRAINING, USUAL_HEAD_DIM, USUAL_TRAINING, Flags, kernels

if TYPE_CHECKING:
    from parallax_gen.memory.shipped import Memory

_TRAINED = (Shape(4, 16, 16, 4096, 4096), Shape(1, 16, 16, 16384, 16384))

# (head_dim, shape): from few bytes to many, alone and in a batch, MHA and GQA; a training step and a long prompt.
USUAL: dict[str, tuple[tuple[int, Shape], ...]] = {
    "forward": tuple((128, shape) for shape in _TRAINED),
    "decode": (
        *((128, Shape(batch, 8, 8, 1, keys)) for batch in (1, 32) for keys in (512, 1024, 4096, 16384)),
        (128, Shape(1, 32, 8, 1, 16384)),
        (128, Shape(32, 32, 8, 1, 8192)),
        (64, Shape(8, 16, 16, 1, 4096)),
    ),
    TRAINING: (
        *((128, shape) for shape in _TRAINED),
        *((dim, shape) for dim, shapes in USUAL_TRAINING.items() for shape in shapes if shape not in _TRAINED),
    ),
}

QUICK_SHAPES = 6  # of each op


class Case(NamedTuple):
    """What baselines are compared at, with fields as of Row."""

    op: str
    spec: KernelSpec
    shape: Shape
    lengths: tuple[int, ...] = ()


def cases_of(
    ops: tuple[str, ...],
    head_dim: int | None,
    dtype: str,
    shapes: tuple[Sizes, ...],
    grid: str | None,
    flags: Flags,
    page_sizes: tuple[int, ...] = (),
    lengths: Lengths | None = None,
) -> Iterator[Case]:
    """What is compared: of a training step the forward's spec stands for all. Raises UsageError.

    page_sizes  of each shape, one after the other, 0 for no pages; () for the flags' own
    lengths     of ragged decode alone
    """
    layouts = [replace(flags, page_size=page_size) for page_size in page_sizes] or [flags]
    for op in ops:
        if shapes:
            asked = [(head_dim or USUAL_HEAD_DIM, sizes.for_op(op)) for sizes in shapes]
        else:
            usual = SWEEPS[grid][op] if grid else USUAL[op]
            asked = [(dim, shape) for dim, shape in usual if head_dim in (None, dim)]
        if not asked:
            raise click.UsageError(f"no usual shape of {op} has head_dim {head_dim}: say which --shape is meant")
        # Windows that are not asked for, or asked for at many shapes, make some of them the same.
        cases = {kernels(op, dim, dtype, shape, layout)[0]: None for dim, shape in asked for layout in layouts}
        for spec, shape in cases:
            yield Case(op, spec, shape, lengths.of(shape) if lengths else ())


def fewer(cases: list[Case], card: Gpu) -> list[Case]:
    """Of each op at most QUICK_SHAPES that fit, spread over all of them, the first and the last among them.

    Of a shape with pages of several sizes all stay. Where no shape fits, of all: the table says of each that it was
    skipped.
    """
    found = []
    for op in dict.fromkeys(case.op for case in cases):
        of_op: dict[tuple[int, Shape], list[Case]] = {}
        for case in cases:
            if case.op == op:
                of_op.setdefault((case.spec.head_dim, case.shape), []).append(case)
        alike = list(of_op.values())
        fitting = [
            each for each in alike if bytes_needed(op, each[0].spec, each[0].shape) <= card.memory_bytes
        ] or alike
        count = min(QUICK_SHAPES, len(fitting))
        for i in range(count):
            found += fitting[i * (len(fitting) - 1) // max(1, count - 1)]
    return found


def sweep(cases: list[Case], names: Sequence[str], card: Gpu, how: Conditions, ledger: Ledger) -> Iterator[list[Row]]:
    """A shape's rows at a time: those that the ledger has, and those that are timed now."""
    from parallax_gen.cli.known import open_memory

    memory, started, timed = open_memory(), time.monotonic(), 0
    for i, case in enumerate(cases):
        asked = _asked(case, names, card, memory, how)
        unknown = {row.contender for row in asked if ledger.known(row) is None}  # who lacks a part is timed whole
        rows = [row for row in map(ledger.known, asked) if row is not None and row.contender not in unknown]
        if unknown:
            left = f", {(time.monotonic() - started) / timed * (len(cases) - i):.0f} s left" if timed else ""
            with console(stderr=True).status(f"[{i + 1}/{len(cases)}{left}] {title(*case)}"):
                new = _timed(case, [row for row in asked if row.contender in unknown], card, how)
            ledger.add(new)
            rows += new
            timed += 1
        yield sorted(rows, key=lambda row: list(BASELINES).index(row.contender))  # stable: parts stay in order


def _asked(case: Case, names: Sequence[str], card: Gpu, memory: Memory, how: Conditions) -> list[Row]:
    """The rows of a shape, without figures."""
    from parallax_gen.bench.conditions import our_kernels
    from parallax_gen.bench.run import PARTS

    op, spec, shape, lengths = case
    found = []
    for baseline in baselines_of(op):
        if baseline.name in names:
            ours = baseline.name == OURS
            package = our_kernels(op, spec, shape, card, memory) if ours else baseline.package()
            row = Row(baseline.name, op, "", spec, shape, package=package, conditions=how, lengths=lengths)
            found += [replace(row, part=part) for part in PARTS[op]]
    return found


def _timed(case: Case, asked: list[Row], card: Gpu, how: Conditions) -> list[Row]:
    """The rows that are asked for, with figures, or with what keeps them from any."""
    op, spec, shape, lengths = case
    needed, there = bytes_needed(op, spec, shape), card.memory_bytes
    if needed > there:
        note = f"skipped: inputs and results take {needed / 1e9:.0f} GB, and the card has {there / 1e9:.0f}"
        return [replace(row, note=note) for row in asked]
    packages = {row.contender: row.package for row in asked}
    found = _compare(op, spec, shape, tuple(packages), how.effort, lengths)
    return [replace(row, package=packages[row.contender], conditions=how) for row in found]


def _compare(
    op: str, spec: KernelSpec, shape: Shape, only: tuple[str, ...], effort: Effort, lengths: tuple[int, ...]
) -> list[Row]:
    from parallax_gen.bench.run import compare

    return compare(op, spec, shape, only, effort, lengths)


def bytes_needed(op: str, spec: KernelSpec, shape: Shape) -> float:
    """Of device memory, at the least: each input and each result once, of a training step the gradients too."""
    whole = replace(shape, window=0)  # a window reads less, and is given as much
    specs = [spec.of(kernel) for kernel in ("forward", "dqdr")] if op == TRAINING else [spec]
    return sum(work_of(each, whole).bytes for each in specs)
