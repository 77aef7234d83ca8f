"""What `bench` goes through: the shapes, each with its lengths, and those of them that the card can hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from parallax_gen.describe import Runs, expand_runs, parse_runs
from parallax_gen.errors import ParallaxGenError
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape, skewed_lengths, spread_lengths
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import work_of
from parallax_gen.problem.workloads import COMPARED, SWEEPS, TRAINING, USUAL_HEAD_DIM, Flags, Sizes, kernels

QUICK_SHAPES = 6  # of each op

NAMED = {"spread": spread_lengths, "skewed": skewed_lengths}


class CaseError(ParallaxGenError):
    """What is asked for is nothing that can be compared."""


class Case(NamedTuple):
    """What baselines are compared at, with fields as of Row."""

    op: str
    spec: KernelSpec
    shape: Shape
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """A --lengths as it was typed: the runs of one batch, or the name of a batch that every shape has."""

    runs: Runs = ()
    named: str = ""

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """What spread, skewed or a text such as 4096,7x128 means. Raises ValueError."""
        text = re.sub(r"\s", "", text)
        if text in NAMED:
            return cls(named=text)
        try:
            return cls(parse_runs(text))
        except ValueError as error:
            raise ValueError(f"{error}, and neither {' nor '.join(NAMED)}") from error

    def of(self, shape: Shape) -> tuple[int, ...]:
        """The keys of each sequence; () where all have as many as the shape says. Raises CaseError."""
        if self.named:
            found = NAMED[self.named](shape)
        else:
            count, longest = sum(count for count, _ in self.runs), max(keys for _, keys in self.runs)
            if count != shape.batch or longest > shape.seqlen_kv:
                raise CaseError(f"--lengths: {count} sequences of up to {longest} keys, not those of --shape {shape}")
            found = expand_runs(self.runs)
        return () if set(found) == {shape.seqlen_kv} else found


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
    """What is compared: of a training step the forward's spec stands for all. Raises CaseError.

    page_sizes  of each shape, one after the other, 0 for no pages; () for the flags' own
    lengths     of ragged decode alone
    """
    layouts = [replace(flags, page_size=page_size) for page_size in page_sizes] or [flags]
    for op in ops:
        if shapes:
            asked = [(head_dim or USUAL_HEAD_DIM, sizes.for_op(op)) for sizes in shapes]
        else:
            usual = SWEEPS[grid][op] if grid else COMPARED[op]
            asked = [(dim, shape) for dim, shape in usual if head_dim in (None, dim)]
        if not asked:
            raise CaseError(f"no usual shape of {op} has head_dim {head_dim}: say which --shape is meant")
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


def bytes_needed(op: str, spec: KernelSpec, shape: Shape) -> float:
    """Of device memory, at the least: each input and each result once, of a training step the gradients too."""
    whole = replace(shape, window=0)  # a window reads less, and is given as much
    specs = [spec.of(kernel) for kernel in ("forward", "dqdr")] if op == TRAINING else [spec]
    return sum(work_of(each, whole).bytes for each in specs)
