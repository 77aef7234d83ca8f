"""The two heat maps as tables of cells: each bucket's fraction of the bound, and baselines' times relative to ours."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from parallax_gen.bench.parts import kernels_in
from parallax_gen.bench.rows import Row
from parallax_gen.describe import brief, number, seqlen_text, with_lengths
from parallax_gen.memory.place import Place
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import rate_unit
from parallax_gen.report.entries import Entry, order_of

# Boundaries of the colour classes: fractions of the bound, and times relative to ours, with 1 in the middle of a class.
FRACTIONS_OF_BOUND = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
RATIOS = (0.8, 0.95, 1.05, 1.25, 1.5, 2.0, 4.0)

LengthsAndWindow = tuple[int, int, int]  # seqlen_q, seqlen_kv, window


@dataclass(frozen=True)
class Cell:
    """A cell: its text and tooltip, its CSS class `kind`, and the key of the entry that it links to."""

    text: str
    tip: str
    kind: str
    key: tuple[Place, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class Matrix:
    """The cells of one kernel: a row per number of (sequence, kv head) pairs, a column per length; None if empty.

    gpu, ops   used by the page's filters
    rows       (label, one cell per column)
    """

    gpu: str
    ops: tuple[str, ...]
    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def kernel_name(spec: KernelSpec) -> str:
    """A kernel's name without its op."""
    return str(spec).partition(", ")[2].replace(", ", " · ")


def coverage(by_place: Mapping[Place, Entry | None]) -> dict[str, dict[str, list[Matrix]]]:
    """By op and GPU: a matrix per kernel, with every bucket that is or could be tuned."""
    by_kernel: dict[tuple[str, str, KernelSpec], dict[tuple[int, LengthsAndWindow], Cell]] = {}
    for place, entry in by_place.items():
        spec, bucket = place.spec, place.bucket
        cells = by_kernel.setdefault((spec.public_op, place.gpu, spec), {})
        cells[bucket.kv_rows, _lengths_and_window(bucket)] = _coverage_cell(place, entry)
    matrices: dict[str, dict[str, list[Matrix]]] = {}
    for (op, gpu, spec), cells in by_kernel.items():
        matrices.setdefault(op, {}).setdefault(gpu, []).append(_matrix(gpu, (op,), kernel_name(spec), cells))
    return matrices


def speed_ups(
    ratios: Iterable[tuple[Row, float | None]],
) -> dict[tuple[str, str], dict[tuple[str, str], list[Matrix]]]:
    """By (GPU, op) and (part, baseline): a matrix per kernel of times relative to ours.

    A cell that several shapes share, or that several files contain, shows its smallest ratio.
    """
    by_kernel: dict[
        tuple[str, str, str, str, KernelSpec], dict[tuple[int, LengthsAndWindow], list[tuple[Row, float | None]]]
    ] = {}
    for row, ratio in ratios:
        shape = row.shape
        kernel = row.provenance.gpu, row.op, row.part, row.baseline, row.spec
        size = shape.batch * shape.kv_heads, _lengths_and_window(shape)
        by_kernel.setdefault(kernel, {}).setdefault(size, []).append((row, ratio))
    by_op: dict[tuple[str, str], dict[tuple[str, str], list[Matrix]]] = {}
    for (gpu, op, part, baseline, spec), sizes in sorted(
        by_kernel.items(), key=lambda item: (*item[0][:2], *order_of(item[0][-1]))
    ):
        cells = {size: _ratio_cell(timed) for size, timed in sizes.items()}
        matrices = by_op.setdefault((gpu, op), {}).setdefault((part, baseline), [])
        matrices.append(_matrix(gpu, kernels_in(op, part), kernel_name(spec), cells))
    return by_op


def _matrix(gpu: str, ops: tuple[str, ...], name: str, cells: Mapping[tuple[int, LengthsAndWindow], Cell]) -> Matrix:
    all_kv_rows = sorted({kv_rows for kv_rows, _ in cells})
    all_lengths = sorted({lengths for _, lengths in cells}, key=lambda lengths: (lengths[1], lengths[0], lengths[2]))
    return Matrix(
        gpu=gpu,
        ops=ops,
        name=name,
        columns=tuple(seqlen_text(Shape(1, 1, 1, *lengths)) for lengths in all_lengths),
        rows=tuple((str(n), tuple(cells.get((n, lengths)) for lengths in all_lengths)) for n in all_kv_rows),
    )


def _lengths_and_window(shape: Bucket | Shape) -> LengthsAndWindow:
    return shape.seqlen_q, shape.seqlen_kv, shape.window


def _coverage_cell(place: Place, entry: Entry | None) -> Cell:
    spec = place.spec
    lines = [f"{place.gpu}: {spec}", str(place.bucket)]
    if entry is None:
        return Cell("", "\n".join([*lines, "not tuned: the default config is used"]), "untuned")
    best, fraction = entry.best, entry.fraction_of_bound
    if best is None or best.time_us is None:
        tried = f"{len(entry.results)} tried, none measured: the default config is used"
        return Cell("", "\n".join([*lines, tried]), entry.state, entry.key)
    lines.append(f"{number(best.time_us)} µs, {number(entry.rate or 0)} {rate_unit(spec.op)}")
    lines += [f"{fraction:.0%} of the roofline's bound"] if fraction is not None else []
    lines += [entry.above_bound_note] if entry.is_above_bound else []
    lines.append(brief(best.config))
    lines += [f"{', '.join(entry.differences)}"] if entry.differences else []
    kind = "known" if fraction is None else f"share{bisect_right(FRACTIONS_OF_BOUND, fraction)}"
    text = "✓" if fraction is None else f"{100 * fraction:.0f}"
    return Cell(text, "\n".join(lines), f"{kind} elsewhere" if entry.differences else kind, entry.key)


def _ratio_cell(timed: list[tuple[Row, float | None]]) -> Cell:
    lines = []
    for row, ratio in timed:
        size_text = with_lengths(row.shape, row.lengths)
        if ratio is not None and row.time_us is not None:
            line = f"{size_text}: {number(row.time_us)} µs, {number(row.time_us / ratio)} ours"
            lines.append(f"{line}; {row.note}" if row.note else line)
        else:
            lines.append(f"{size_text}: {row.note or 'not timed with ours'}")
    ratios = [ratio for _, ratio in timed if ratio is not None]
    lines.insert(0, timed[0][0].baseline)
    if not ratios:
        return Cell("–", "\n".join(lines), "untimed")
    return Cell(_two_digits(min(ratios)), "\n".join(lines), f"ratio{bisect_right(RATIOS, min(ratios))}")


def _two_digits(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
