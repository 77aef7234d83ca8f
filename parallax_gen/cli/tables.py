"""How `bench`'s rows are put for people: a table a shape, and what they come to over all shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import click

from parallax_gen.bench.rows import OURS, SOFTMAX, Row
from parallax_gen.cli.text import print_table
from parallax_gen.describe import number, with_lengths
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import rate_unit
from parallax_gen.problem.workloads import TRAINING


def title(op: str, spec: KernelSpec, shape: Shape, lengths: Sequence[int] = ()) -> str:
    """What is compared: of a training step what its kernels have in common."""
    what = f"{TRAINING}, {str(spec.of('dqdr')).partition(', ')[2]}" if op == TRAINING else str(spec)
    return f"{what}: {with_lengths(shape, lengths)}"


def print_rows(rows: list[Row]) -> None:
    """A table of one op at one shape, a line a contender."""
    first, notes = rows[0], {row.note for row in rows}
    quick = first.conditions is not None and first.conditions.effort.quick
    click.echo(title(first.op, first.spec, first.shape, first.lengths) + " (quick)" * quick)
    if len(notes) == 1 and not any(row.time_us for row in rows):
        click.echo(first.note)
    elif first.op == TRAINING:
        _print_steps(rows)
    else:
        _print_calls(rows)
    click.echo()


def _print_calls(rows: list[Row]) -> None:
    ours = next((row.time_us for row in rows if row.contender == OURS), None)
    columns = ("", "time us", "20 %", "80 %", rate_unit(rows[0].op), "time / ours", "error")
    table = []
    for row in rows:
        times = f"{row.time_us / ours:.2f}" if ours and row.time_us else "-"
        numbers = (row.time_us, row.p20_us, row.p80_us, row.rate)
        table.append((row.contender, *map(_number, numbers), times, _error(row)))
    print_table(columns, table, right=columns[1:])
    _print_notes({row.contender: [row] for row in rows})


def _print_steps(rows: list[Row]) -> None:
    """Three times and rates, the output's error and the largest of the gradients'."""
    of: dict[str, list[Row]] = {}
    for row in rows:
        of.setdefault(row.contender, []).append(row)
    columns = [""]
    for part in ("forward", "backward", "step"):
        columns += [{"forward": "fwd", "backward": "bwd"}.get(part, part) + " ms", "TF/s"]
    columns += ["err out", "grads"]
    table = []
    for name, parts in of.items():
        cells = [name]
        for row in parts:
            cells += [_number(row.time_us and row.time_us / 1000), _number(row.rate)]
        table.append((*cells, *(_error(row) for row in parts[:2])))
    print_table(columns, table, right=columns[1:])
    _print_notes(of)


def _print_notes(of: dict[str, list[Row]]) -> None:
    """Below the table, for they may be long; whoever shares a note shares its line."""
    noted: dict[str, list[str]] = {}
    for name, parts in of.items():
        for note in dict.fromkeys(row.note for row in parts if row.note):
            which = [row.part for row in parts if row.note == note]
            who = name if len(which) == len(parts) else f"{name}, {' and '.join(which)}"
            noted.setdefault(note, []).append(who)
    for note, names in noted.items():
        click.echo(f"{'; '.join(names)}: {note}")


def _number(value: float | None) -> str:
    return number(value) if value else "-"


def _error(row: Row) -> str:
    if row.time_us is None:
        return "-"
    if row.error is None:
        return "softmax" if row.contender in SOFTMAX else "-"
    return f"{row.error:.1e}"


def print_means(rows: list[Row]) -> None:
    """How many times ours each contender takes, part by part, over all shapes where both run."""
    ours = {row.what: row.time_us for row in rows if row.contender == OURS}
    ratios: dict[tuple[str, str], dict[str, list[float]]] = {(row.op, row.part): {} for row in rows}
    for row in rows:
        mine = ours.get(row.what)
        if mine and row.time_us and row.contender != OURS:
            ratios[row.op, row.part].setdefault(row.contender, []).append(row.time_us / mine)
    for (op, part), of_contender in ratios.items():
        what = op if op == part else f"{op} {part}"
        for name, values in of_contender.items():
            mean = math.exp(sum(map(math.log, values)) / len(values))
            told = f"geometric mean of {len(values)}, least {min(values):.2f}"
            click.echo(f"{what}: {name} takes {mean:.2f} times ours ({told})")
