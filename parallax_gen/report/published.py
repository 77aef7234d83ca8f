"""Published comparisons with other kernels: the CSVs of docs/figures/, which the package ships.

They were measured on the cards that they name, by `parallax-gen bench`; docs/figures.md has the commands.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from parallax_gen.bench.summary import Mean
from parallax_gen.files import data_dir
from parallax_gen.problem.workloads import TRAINING

Row = dict[str, str]

# Op -> the column of our time, and how the columns of other kernels' times end.
TIMES = {TRAINING: ("step, ms", " step, ms"), "decode": ("parallax_gen, µs", ", µs")}
CHANGED = "no longer rendered"  # in the note of a row: the kernel has changed since


@dataclass(frozen=True)
class Published:
    """The times of one baseline relative to ours on one card.

    conditions  versions and date
    changed     whether all rows, or some, were measured with a kernel that has changed since; "" if none was
    """

    gpu: str
    op: str
    baseline: str
    ratio: Mean
    conditions: str
    changed: str


def published(gpus: Iterable[str]) -> list[Published]:
    """The published comparisons of these cards, op by op. Raises ParallaxGenError if the CSVs are missing."""
    files = sorted(data_dir("figures").glob("*.csv"))
    return [found for gpu in gpus for op in TIMES for path in files for found in _of_file(path, gpu, op)]


def _of_file(path: Path, gpu: str, op: str) -> Iterator[Published]:
    """The comparisons in OP_GPU.csv, or in OP_GPU_triton39.csv, of another Triton; none if it is neither."""
    if path.stem.partition("_triton")[0] != f"{op}_{gpu}":
        return
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    ours, ending = TIMES[op]
    for column in rows[0]:
        timed = [row for row in rows if row[column]]
        if timed and column.endswith(ending) and column != ours:
            ratios = [float(row[column]) / float(row[ours]) for row in timed]
            mean = Mean(geometric_mean(ratios), min(ratios), len(ratios))
            yield Published(gpu, op, column.removesuffix(ending), mean, _conditions(rows[0]), _changed(timed))


def _conditions(row: Row) -> str:
    torch = f"torch {row['torch']}, " if row["torch"] else ""
    return f"{torch}Triton {row['Triton']}, {row['date']}"


def _changed(rows: list[Row]) -> str:
    changed = sum(CHANGED in row["note"] for row in rows)
    return "" if not changed else "all" if changed == len(rows) else "some"
