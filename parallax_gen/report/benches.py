"""Reads what `parallax-gen bench` wrote, CSV or JSON, and checks it like a user's input."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from parallax_gen.bench.rows import OURS
from parallax_gen.describe import from_text
from parallax_gen.errors import ArgumentError, ParallaxGenError, UnknownGpuError
from parallax_gen.memory.bounds import NUMBERS, shown
from parallax_gen.memory.old import op_named
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Shape, within_bounds
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import TRAINING

# Columns that every row must have. Others may be there, and of a kernel's flags those that a file lacks are off.
SIZES = tuple(f.name for f in fields(Shape))
NEEDED = ("op", "part", "contender", "head_dim", "dtype", "time_us", *(name for name in SIZES if name != "window"))
CARD = ("gpu", "card")  # a column or a JSON field that says which card it was
# Where and how figures were taken, as far as a file says so: those of two such conditions are not compared.
CONDITIONS = ("card", "parallax_gen", "torch", "triton", "cuda", "rounds", "timed_ms", "oracle", "hasty", "quick")
NO_FLAGS = ("op", "head_dim", "dtype", "group", "window")
FLAGS = [name for name in KernelSpec("forward", 128, "bf16").flat() if name not in NO_FLAGS]
MOST_DIGITS = 20  # of an int
_TRUTH = {"True": True, "False": False}


@dataclass(frozen=True)
class Timing:
    """One contender at one shape, and one part of what it does there.

    file      its name: contenders are compared within a file, where they ran in one process on the same inputs
    gpu       the card's short name; "" where the file does not say
    op, part  as bench has them: of a training step "forward", "backward" and "step"
    time_us   None where it did not run; `note` says why
    error     against the fp64 oracle; None for softmax, and for what did not run
    taken     where and how, in words: what the file has of CONDITIONS
    command   that took it, if the file has it
    lengths   of ragged decode, the keys of each sequence; () where all have as many as the shape says
    """

    file: str
    gpu: str
    op: str
    part: str
    contender: str
    spec: KernelSpec
    shape: Shape
    time_us: float | None
    error: float | None
    note: str
    taken: str = ""
    command: str = ""
    lengths: tuple[int, ...] = ()

    @property
    def what(self) -> tuple[Any, ...]:
        """What contenders are compared at."""
        return self.file, self.gpu, self.taken, self.op, self.part, self.spec, self.shape, self.lengths


def read_bench(path: Path) -> list[Timing]:
    """The rows of a file of `bench --csv` or `bench --json`.

    Raises ParallaxGenError, naming file and line (of JSON the row), on what is not such a file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParallaxGenError(f"cannot read {path}: {error}") from error
    rows = _json_rows(path, text) if text.lstrip().startswith("{") else _csv_rows(path, text)
    return [_timing(path, where, row) for where, row in rows]


def times_ours(timings: list[Timing]) -> list[tuple[Timing, float | None]]:
    """Every other contender's rows, each with its time over ours; None where either did not run.

    Both are of one file and of the same conditions; of what a file has twice the last counts.
    """
    last = {(timing.what, timing.contender): timing for timing in timings}
    found: list[tuple[Timing, float | None]] = []
    for (what, contender), timing in last.items():
        if contender != OURS:
            ours = last.get((what, OURS))
            ratio = timing.time_us / ours.time_us if ours and ours.time_us and timing.time_us else None
            found.append((timing, ratio))
    return found


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        names = reader.fieldnames or []
        missing = [name for name in NEEDED if name not in names]
        if missing:
            came = f"the columns {', '.join(names)}" if names else "no columns"
            raise ArgumentError(f"{path}, line 1", came, f"a CSV file of parallax-gen bench, with {', '.join(missing)}")
        for row in reader:
            where = f"line {reader.line_num}"
            if None in row or None in row.values():  # more cells than columns, or fewer
                raise ArgumentError(f"{path}, {where}", "another number of cells", f"{len(names)}, as line 1 has them")
            yield where, dict(row)
    except csv.Error as error:
        raise ParallaxGenError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows as a CSV file has them: in one level, numbers and flags as text."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ParallaxGenError(f"{path}: not JSON: {error}") from error
    rows = document.get("rows")
    if not isinstance(rows, list):
        raise ArgumentError(f"{path}, rows", shown(rows), "a list, as parallax-gen bench --json writes it")
    of_all = {name: document[name] for name in (*CARD, *CONDITIONS) if name in document}
    for number, row in enumerate(rows, start=1):
        where = f"row {number}"
        if not isinstance(row, dict) or not all(isinstance(row.get(part), dict) for part in ("spec", "shape")):
            raise ArgumentError(f"{path}, {where}", shown(row), "an object with a spec and a shape")
        flat = {**of_all, **row["spec"], "window": 0, **row["shape"], **row}
        if missing := [name for name in NEEDED if name not in flat]:
            raise ArgumentError(f"{path}, {where}", f"an object without {', '.join(missing)}", "a row of bench --json")
        yield where, {name: "" if value is None else _as_text(value) for name, value in flat.items()}


def _as_text(value: object) -> str:
    """A number or a flag as CSV has it. What a row holds beside them is not looked at, and may be of any depth."""
    return value if isinstance(value, str) else shown(value) if isinstance(value, dict | list) else str(value)


def _timing(path: Path, where: str, row: Mapping[str, str]) -> Timing:
    """Raises ArgumentError, naming file, line and column."""
    at = f"{path}, {where}"
    try:
        shape = within_bounds(Shape(**{name: _int(at, name, row.get(name) or "0") for name in SIZES}))
        flags = {name: _flag(at, name, row[name]) for name in FLAGS if row.get(name)}
        spec = KernelSpec(
            op=op_named("forward" if row["op"] == TRAINING else row["op"], flags.pop("ragged", False)),
            head_dim=_int(at, "head_dim", row["head_dim"]),
            dtype=row["dtype"],
            group=shape.group,
            window=shape.window > 0,
            **flags,
        )
    except ArgumentError as error:
        if error.argument.startswith(at):
            raise
        raise ArgumentError(f"{at}: {error.argument}", error.got, error.allowed) from error
    return Timing(
        file=path.name,
        gpu=_card(next((row[name] for name in CARD if row.get(name)), "")),
        op=row["op"],
        part=row["part"],
        contender=row["contender"],
        spec=spec,
        shape=shape,
        time_us=_positive(at, "time_us", row["time_us"]),
        error=_positive(at, "error", row.get("error", "")),
        note=row.get("note", ""),
        taken=", ".join(f"{name} {row[name]}" for name in CONDITIONS if row.get(name)),
        command=row.get("command", ""),
        lengths=_lengths(at, row.get("lengths", "")),
    )


def _card(name: str) -> str:
    """A card's short name, of whatever it was called; one that is not in the table keeps its own."""
    try:
        return gpu_by_name(name).name if name else ""
    except UnknownGpuError:
        return name


def _flag(at: str, name: str, text: str) -> Any:
    if name == "page_size":
        return _int(at, name, text)
    if name == "cache_dtype":
        return text
    if text not in _TRUTH:
        raise ArgumentError(f"{at}: {name}", repr(text), "True or False")
    return _TRUTH[text]


def _lengths(at: str, text: str) -> tuple[int, ...]:
    try:
        return from_text(text)
    except ValueError as error:
        raise ArgumentError(f"{at}: lengths", shown(text), "keys of each sequence, such as 4096,7x128") from error


def _int(at: str, name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS):
        raise ArgumentError(f"{at}: {name}", shown(text), f"an int of 0 or more, of at most {MOST_DIGITS} digits")
    return int(text)


def _positive(at: str, name: str, text: str) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    least, most = NUMBERS[name]
    if value is not None and not least <= value <= most:
        raise ArgumentError(f"{at}: {name}", shown(text), f"a number from {least:g} to {most:g}, or nothing")
    return value
