"""Summaries of `bench`'s rows: times relative to ours, their means, and the table of a case."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from statistics import geometric_mean
from typing import NamedTuple, TypeVar

from parallax_gen.bench.baselines import BASELINES, OURS
from parallax_gen.bench.parts import PARTS
from parallax_gen.bench.rows import Conditions, Row
from parallax_gen.describe import number, with_lengths
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.steps import title_of
from parallax_gen.problem.work import rate_unit
from parallax_gen.problem.workloads import TRAINING

Key = TypeVar("Key", bound=Hashable)
QUICK_NOTE = ", quick: not for publication"
Ratios = Iterable[tuple[Row, "float | None"]]


class LargestErrors(NamedTuple):
    """The largest errors on the usual inputs and on peaked ones; None if none is known."""

    usual: float | None
    peaked: float | None


class Mean(NamedTuple):
    """The geometric mean of times relative to ours, the smallest such time, and the number of shapes."""

    mean: float
    least: float
    shapes: int


def times_ours(rows: Iterable[Row]) -> list[tuple[Row, float | None]]:
    """Every other baseline's rows, each with its time divided by ours; None if either did not run.

    Both rows have the same case, part and provenance. Of duplicate rows the last one counts.
    """
    last = _last(rows)
    ratios: list[tuple[Row, float | None]] = []
    for (compared_at, name), row in last.items():
        if name != OURS:
            ours = last.get((compared_at, OURS))
            ratios.append((row, row.time_us / ours.time_us if ours and ours.time_us and row.time_us else None))
    return ratios


def _last(rows: Iterable[Row]) -> dict[tuple[tuple[object, ...], str], Row]:
    return {(row.compared_at, row.baseline): row for row in rows}


def largest_errors(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, LargestErrors]:
    """The largest errors over the rows with the same key, of keys with any. Of duplicate rows the last one counts."""
    by_key: dict[Key, list[Row]] = {}
    for row in _last(rows).values():
        if row.error is not None or row.peaked_error is not None:
            by_key.setdefault(key(row), []).append(row)
    return {
        group: LargestErrors(
            max((row.error for row in known if row.error is not None), default=None),
            max((row.peaked_error for row in known if row.peaked_error is not None), default=None),
        )
        for group, known in by_key.items()
    }


def means(ratios: Ratios, key: Callable[[Row], Key]) -> dict[Key, Mean]:
    """The means of the known ratios, over the rows with the same key."""
    by_key: dict[Key, list[float]] = {}
    for row, ratio in ratios:
        if ratio is not None:
            by_key.setdefault(key(row), []).append(ratio)
    return {group: Mean(geometric_mean(r), min(r), len(r)) for group, r in by_key.items()}


# -- Tables


ERROR_COLUMNS = ("error", "peaked")  # on the usual inputs, and on peaked ones


class Table(NamedTuple):
    """Column titles, and a line of cells per baseline."""

    columns: tuple[str, ...]
    lines: list[tuple[str, ...]]


def title(op: str, spec: KernelSpec, shape: Shape, lengths: Sequence[int] = ()) -> str:
    """The title of a case. For a training step it has the part of the spec that the step's kernels share."""
    return f"{title_of(spec, op)}: {with_lengths(shape, lengths)}"


def table_of(rows: list[Row]) -> Table:
    """The table of one case."""
    return _step_table(rows) if rows[0].op == TRAINING else _call_table(rows)


def _call_table(rows: list[Row]) -> Table:
    columns = ("", "time us", "p20 us", "p80 us", rate_unit(rows[0].op), "time / ours", *ERROR_COLUMNS)
    ratios = dict(times_ours(rows))
    lines = []
    for row in rows:
        ratio = ratios.get(row, 1.0 if row.time_us else None)  # `ratios` has no row of ours
        numbers = (row.time_us, row.p20_us, row.p80_us, row.rate)
        ratio_text = "-" if ratio is None else f"{ratio:.2f}"
        lines.append((row.baseline, *map(_number, numbers), ratio_text, *_errors(row)))
    return Table(columns, lines)


def _step_table(rows: list[Row]) -> Table:
    """The table of a training step: three times and rates, and the step's errors."""
    columns = [""]
    for part in PARTS[TRAINING].values():
        columns += [f"{part.heading} ms", "TF/s"]
    columns += ERROR_COLUMNS
    lines = []
    for name, parts in _by_baseline(rows).items():
        cells = [name]
        for row in parts:
            cells += [_number(row.time_us and row.time_us / 1000), _number(row.rate)]
        lines.append((*cells, *_errors(parts[-1])))
    return Table(tuple(columns), lines)


def notes_of(rows: list[Row]) -> list[str]:
    """The notes, to be printed below the table because they may be long; baselines with the same note share a line."""
    noted: dict[str, list[str]] = {}
    for name, parts in _by_baseline(rows).items():
        for note in dict.fromkeys(row.note for row in parts if row.note):
            noted_parts = [row.part for row in parts if row.note == note]
            label = name if len(noted_parts) == len(parts) else f"{name}, {' and '.join(noted_parts)}"
            noted.setdefault(note, []).append(label)
    return [f"{'; '.join(names)}: {note}" for note, names in noted.items()]


def condition_lines(conditions: Conditions, rows: list[Row]) -> list[str]:
    """The card, the versions, and how the times of rows were measured."""
    packages = {row.baseline: row.package for row in rows if row.time_us and row.package and row.baseline != OURS}
    effort = conditions.effort
    rounds = "1 round" if effort.rounds == 1 else f"{effort.rounds} rounds"
    timing = f"medians of CUDA graph replays, warm L2: {rounds} of {effort.timed_ms:.0f} ms"
    sampled = "errors cover the first and the last sequence and kv head"
    return [
        conditions.card,
        conditions.versions,
        *(f"{name}: {package}" for name, package in packages.items()),
        timing + QUICK_NOTE * effort.quick,
        *[sampled] * (effort.oracle == "sample"),
    ]


def mean_lines(rows: list[Row]) -> list[str]:
    """A line per part and baseline: its mean time relative to ours over all cases where both run."""
    mean_by_part = means(times_ours(rows), key=lambda row: (row.op, row.part, row.baseline))
    parts = list(dict.fromkeys((row.op, row.part) for row in rows))
    return [
        f"{op if op == part else f'{op} {part}'}: {name} takes {mean:.2f}x our time "
        f"(geometric mean of {count} {'shape' if count == 1 else 'shapes'}, least {smallest:.2f}x)"
        for (op, part, name), (mean, smallest, count) in sorted(
            mean_by_part.items(), key=lambda item: parts.index(item[0][:2])
        )
    ]


def _by_baseline(rows: list[Row]) -> dict[str, list[Row]]:
    by_baseline: dict[str, list[Row]] = {}
    for row in rows:
        by_baseline.setdefault(row.baseline, []).append(row)
    return by_baseline


def _number(value: float | None) -> str:
    return number(value) if value else "-"


def error_text(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def _errors(row: Row) -> tuple[str, str]:
    """The cells of ERROR_COLUMNS."""
    if row.time_us is None:
        return "-", "-"
    if row.error is None and BASELINES[row.baseline].softmax:
        return "softmax", "-"
    return error_text(row.error), error_text(row.peaked_error)
