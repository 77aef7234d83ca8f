"""How `bench`'s rows are put: tables for people, CSV and JSON for programs, and what they come to over all shapes."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parallax_gen.cli.text import number, print_table, rate_unit
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.usual import TRAINING

if TYPE_CHECKING:
    from parallax_gen.cli.compare import Row

OURS = "parallax_gen"


def title(op: str, spec: KernelSpec, shape: Shape) -> str:
    """What is compared: of a training step what its kernels have in common."""
    what = f"{TRAINING}, {str(spec.of('dqdr')).partition(', ')[2]}" if op == TRAINING else str(spec)
    return f"{what}: {shape}"


def print_rows(rows: list[Row]) -> None:
    """A table of one op at one shape, a line a contender."""
    first = rows[0]
    click.echo(title(first.op, first.spec, first.shape))
    if first.op == TRAINING:
        _print_steps(rows)
    else:
        _print_calls(rows)
    click.echo()


def _print_calls(rows: list[Row]) -> None:
    ours = next((row.time_us for row in rows if row.contender == OURS), None)
    columns = ("", "time us", rate_unit(rows[0].op), "time / ours", "error", "note")
    table = []
    for row in rows:
        times = f"{row.time_us / ours:.2f}" if ours and row.time_us else "-"
        table.append((row.contender, _number(row.time_us), _number(row.rate), times, _error(row), row.note))
    print_table(columns, table, right=columns[1:5])


def _print_steps(rows: list[Row]) -> None:
    """Three times and rates, the output's error and the largest of the gradients'; notes below, they may be long."""
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
    for name, parts in of.items():
        for note in dict.fromkeys(row.note for row in parts if row.note):
            noted = [row.part for row in parts if row.note == note]
            click.echo(f"{name}: {note}" if len(noted) == len(parts) else f"{name}, {' and '.join(noted)}: {note}")


def _number(value: float | None) -> str:
    return number(value) if value else "-"


def _error(row: Row) -> str:
    if row.time_us is None:
        return "-"
    return "softmax" if row.error is None else f"{row.error:.1e}"


def print_means(rows: list[Row]) -> None:
    """How many times ours each contender takes, part by part, over all shapes where both run."""
    ours = {(row.op, row.part, row.spec, row.shape): row.time_us for row in rows if row.contender == OURS}
    ratios: dict[tuple[str, str], dict[str, list[float]]] = {(row.op, row.part): {} for row in rows}
    for row in rows:
        mine = ours.get((row.op, row.part, row.spec, row.shape))
        if mine and row.time_us and row.contender != OURS:
            ratios[row.op, row.part].setdefault(row.contender, []).append(row.time_us / mine)
    for (op, part), of_contender in ratios.items():
        what = op if op == part else f"{op} {part}"
        for name, values in of_contender.items():
            mean = math.exp(sum(map(math.log, values)) / len(values))
            told = f"geometric mean of {len(values)}, least {min(values):.2f}"
            click.echo(f"{what}: {name} takes {mean:.2f} times ours ({told})")


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        documents = [_flat(row) for row in rows]
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for flat in documents for name in flat)))
        writer.writeheader()
        writer.writerows(documents)


def to_json(row: Row) -> dict[str, Any]:
    return {
        "contender": row.contender,
        "op": row.op,
        "part": row.part,
        "spec": row.spec.to_dict(),
        "shape": row.shape.to_dict(),
        "time_us": row.time_us,
        "rate": row.rate,
        "rate_unit": rate_unit(row.spec.op),
        "error": row.error,
        "note": row.note,
    }


def _flat(row: Row) -> dict[str, Any]:
    """In one level, every field there: the window is a number, that of the shape."""
    document = to_json(row)
    del document["spec"], document["shape"]
    return {**asdict(row.spec), **asdict(row.shape), **document}
