"""The cases of `bench`: shapes with their lengths, and the selection for --quick."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from parallax_gen.describe import RunLengths, expand_run_lengths, parse_run_lengths
from parallax_gen.errors import ParallaxGenError
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape, skewed_lengths, spread_lengths
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import work_of
from parallax_gen.problem.workloads import BENCH_GRIDS, DEFAULT_SHAPES, TRAINING, USUAL_HEAD_DIM, Flags, Sizes, kernels

QUICK_SHAPES = 6  # per op

PATTERNS = {"spread": spread_lengths, "skewed": skewed_lengths}


class CaseError(ParallaxGenError):
    """The options select no case that can be benchmarked."""


class Case(NamedTuple):
    """One benchmark that all baselines run. Its fields are fields of Row."""

    op: str
    spec: KernelSpec
    shape: Shape
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """The parsed --lengths: the run lengths of one batch, or for every shape a pattern, by its name in PATTERNS."""

    run_lengths: RunLengths = ()
    pattern: str = ""

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Parse spread, skewed or a text such as 4096,7x128. Raises ValueError."""
        text = re.sub(r"\s", "", text)
        if text in PATTERNS:
            return cls(pattern=text)
        try:
            return cls(parse_run_lengths(text))
        except ValueError as error:
            raise ValueError(f"{error}, and neither {' nor '.join(PATTERNS)}") from error

    def of(self, shape: Shape) -> tuple[int, ...]:
        """The number of keys of each sequence; () if all have the shape's. Raises CaseError."""
        if self.pattern:
            lengths = PATTERNS[self.pattern](shape)
        else:
            count, longest = sum(count for count, _ in self.run_lengths), max(keys for _, keys in self.run_lengths)
            if count != shape.batch or longest > shape.seqlen_kv:
                raise CaseError(f"--lengths: {count} sequences of up to {longest} keys do not fit --shape {shape}")
            lengths = expand_run_lengths(self.run_lengths)
        return () if set(lengths) == {shape.seqlen_kv} else lengths


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
    """The cases to compare; the forward's spec stands for a whole training step. Raises CaseError.

    page_sizes  every shape runs with each of these page sizes, 0 for no pages; () for the flags' page_size
    lengths     only for decode with per-sequence lengths
    """
    flags_by_page_size = [replace(flags, page_size=page_size) for page_size in page_sizes] or [flags]
    for op in ops:
        if shapes:
            dims_and_shapes = [(head_dim or USUAL_HEAD_DIM, sizes.for_op(op)) for sizes in shapes]
        else:
            usual_shapes = BENCH_GRIDS[grid][op] if grid else DEFAULT_SHAPES[op]
            dims_and_shapes = [(dim, shape) for dim, shape in usual_shapes if head_dim in (None, dim)]
        if not dims_and_shapes:
            raise CaseError(f"no usual shape of {op} has head_dim {head_dim}: give a --shape")
        # Shapes that differ only in a window may become the same case, so duplicates are dropped.
        cases = {
            kernels(op, dim, dtype, shape, with_pages)[0]: None
            for dim, shape in dims_and_shapes
            for with_pages in flags_by_page_size
        }
        for spec, shape in cases:
            yield Case(op, spec, shape, lengths.of(shape) if lengths else ())


def quick_cases(cases: list[Case], card: Gpu) -> list[Case]:
    """At most QUICK_SHAPES shapes per op that fit the card, evenly spread, including the first and the last.

    All page sizes of a chosen shape are kept. If no shape fits, the choice is among all shapes, and the table shows
    each as skipped.
    """
    chosen = []
    for op in dict.fromkeys(case.op for case in cases):
        by_shape: dict[tuple[int, Shape], list[Case]] = {}
        for case in cases:
            if case.op == op:
                by_shape.setdefault((case.spec.head_dim, case.shape), []).append(case)
        shapes = list(by_shape.values())
        fitting = [
            group for group in shapes if bytes_needed(op, group[0].spec, group[0].shape) <= card.memory_bytes
        ] or shapes
        count = min(QUICK_SHAPES, len(fitting))
        for i in range(count):
            chosen += fitting[i * (len(fitting) - 1) // max(1, count - 1)]
    return chosen


def bytes_needed(op: str, spec: KernelSpec, shape: Shape) -> float:
    """The minimum device memory: each input and each result once, and the gradients of a training step."""
    unwindowed = replace(shape, window=0)  # a window reads fewer keys, but all are allocated
    specs = [spec.for_op(kernel) for kernel in ("forward", "dqdr")] if op == TRAINING else [spec]
    return sum(work_of(kernel, unwindowed).bytes for kernel in specs)
