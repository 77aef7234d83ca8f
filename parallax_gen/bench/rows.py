"""`bench`'s rows: one baseline at one shape, and where and how its figures were taken; to files, and back."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from parallax_gen.describe import lengths_from_text, lengths_to_text
from parallax_gen.errors import ArgumentError, ParallaxGenError, UnknownGpuError
from parallax_gen.files import replace_file
from parallax_gen.memory.bounds import NUMBERS, shown
from parallax_gen.memory.old import spec_from_op
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Shape, within_bounds
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import rate_unit
from parallax_gen.problem.workloads import TRAINING


@dataclass(frozen=True)
class Effort:
    """How much time is spent on figures.

    rounds    each baseline is timed so often, in turn: what drifts, drifts for all
    timed_ms  about so long in each round
    oracle    "whole": errors are of everything; "sample": of the first and last sequence and kv head; "none"
    hasty     slow peers are timed once, with few calls, and Triton's autotuners try each config with a few calls
    quick     fewer shapes: figures to look at, not to quote
    """

    rounds: int = 3
    timed_ms: float = 60.0
    oracle: str = "whole"
    hasty: bool = False
    quick: bool = False


WITH_CARE = Effort()
A_GRID = Effort(rounds=1, timed_ms=30.0, oracle="sample", hasty=True)
QUICK = Effort(rounds=1, timed_ms=10.0, oracle="sample", hasty=True, quick=True)


@dataclass(frozen=True)
class Conditions:
    """Where and how figures were taken. An old figure stands for a new one where all but the command is the same."""

    gpu: str
    card: str
    parallax_gen: str
    torch: str
    triton: str
    cuda: str
    effort: Effort
    command: str = field(default="", compare=False)

    @property
    def versions(self) -> str:
        return f"parallax_gen {self.parallax_gen}, torch {self.torch}, Triton {self.triton}, CUDA {self.cuda}"

    def flat(self) -> dict[str, Any]:
        """Every field in one level, the effort's among them."""
        return {**{name: value for name, value in vars(self).items() if name != "effort"}, **asdict(self.effort)}


@dataclass(frozen=True)
class Origin:
    """The file that a row was read from, and what that says of where and how the row was taken.

    file     its name: baselines are compared within a file, where they ran in one process on the same inputs
    gpu      the card's short name; "" where the file does not say
    taken    in words: what the file has of TAKEN
    command  that took it, if the file has it
    """

    file: str = ""
    gpu: str = ""
    taken: str = ""
    command: str = field(default="", compare=False)


@dataclass(frozen=True)
class Row:
    """One baseline at one shape, and one part of what it does there.

    op             "forward", "decode" or TRAINING
    part           what was timed, of PARTS[op] in bench/parts.py
    spec           the forward's or the decode's
    time_us        median of the rounds' medians, by tuning/workers/measure.py's protocol; None where it does not run
    p20_us, p80_us likewise, of the rounds' 20th and 80th percentiles
    rate           TFLOP/s, GB/s for decode, of the work of Parallax (of softmax for a softmax peer)
    error          ||found - oracle|| / ||oracle|| of the output, or the largest of the gradients'; None for softmax
                   peers, and where none was asked for
    checked        pairs of a sequence and a kv head that the error is of
    note           why there is no time, or what is unlike others in how it was timed
    package        its packages and their versions; of ours the kernels' hash
    conditions     None while they are not yet known
    lengths        of ragged decode, the keys of each sequence; () where all have as many as the shape says
    origin         of a row that `read_rows` found
    """

    contender: str
    op: str
    part: str
    spec: KernelSpec
    shape: Shape
    time_us: float | None = None
    rate: float | None = None
    error: float | None = None
    note: str = ""
    p20_us: float | None = None
    p80_us: float | None = None
    checked: int = 0
    package: str = ""
    conditions: Conditions | None = None
    lengths: tuple[int, ...] = ()
    origin: Origin = Origin()

    @property
    def what(self) -> tuple[object, ...]:
        """What baselines are compared at."""
        return self.origin, self.op, self.part, self.spec, self.shape, self.lengths


_OWN = [f.name for f in fields(Row) if f.name not in ("spec", "shape", "conditions", "origin")]  # not nested


def to_json(row: Row) -> dict[str, Any]:
    conditions = {} if row.conditions is None else row.conditions.flat()
    own = {name: getattr(row, name) for name in _OWN} | {"lengths": lengths_to_text(row.lengths)}
    sizes = {"spec": row.spec.to_dict(), "shape": row.shape.to_dict()}
    return {**own, **sizes, "rate_unit": rate_unit(row.spec.op), **conditions}


def to_flat(row: Row) -> dict[str, Any]:
    """In one level, with every field in every row. The window is a number, that of the shape; op is the row's."""
    document = to_json(row)
    del document["spec"], document["shape"]
    return {**row.spec.flat(), **asdict(row.shape), **document}


# -- From text: what a file has is checked like a user's input.

# What every row must have. Other columns may be missing: of a kernel's flags those are off.
SIZES = tuple(f.name for f in fields(Shape))
NEEDED = ("op", "part", "contender", "head_dim", "dtype", "time_us", *(name for name in SIZES if name != "window"))
CARD = ("gpu", "card")  # a column or a JSON field that says which card it was
# Where and how figures were taken, as far as a file says so: those of two such conditions are not compared.
TAKEN = ("card", "parallax_gen", "torch", "triton", "cuda", "rounds", "timed_ms", "oracle", "hasty", "quick")
_ANY_SPEC = KernelSpec("decode", 64, "bf16")
_OF_SPEC = {
    name: type(value).__name__
    for name, value in _ANY_SPEC.flat().items()
    if name not in ("op", "head_dim", "group", "window")  # of the row or the shape
}
_OF_ROW = {f.name: str(f.type) for f in fields(Row) if f.name in _OWN}
_OF_CONDITIONS = {f.name: str(f.type) for f in fields(Conditions) if f.name != "effort"}
_OF_EFFORT = {f.name: str(f.type) for f in fields(Effort)}
_TRUTH = {"True": True, "False": False}
_MOST_DIGITS = 20  # of an int
_BOUNDS = {**dict.fromkeys(("time_us", "p20_us", "p80_us"), NUMBERS["time_us"]), "error": NUMBERS["error"]}


def row_from(texts: Mapping[str, str], at: str) -> Row:
    """The row that a line of a file is, from its cells by column, without conditions.

    Raises ArgumentError that names the line, by `at`, and the column. Times are within the bounds of memory/bounds.py,
    so that rates and ratios of them are numbers.
    """
    with _named(at):
        shape = within_bounds(Shape(**{name: _int(name, texts.get(name) or "0") for name in SIZES}))
        head_dim, others = _int("head_dim", texts["head_dim"]), _said(_OF_SPEC, texts)
        op, of_shape = "forward" if texts["op"] == TRAINING else texts["op"], {"window": shape.window > 0}
        spec = spec_from_op(op, others.pop("ragged", False), head_dim=head_dim, group=shape.group, **of_shape, **others)
        return Row(spec=spec, shape=shape, **_said(_OF_ROW, texts))


def from_flat(texts: Mapping[str, str]) -> Row:
    """The row that `to_flat` wrote, with its conditions, from its fields as text. Raises ArgumentError."""
    of_effort, of_others = (
        {name: _READ[of_type](name, texts[name]) for name, of_type in types.items()}
        for types in (_OF_EFFORT, _OF_CONDITIONS)
    )
    return replace(row_from(texts, "the row"), conditions=Conditions(effort=Effort(**of_effort), **of_others))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of `bench --csv` or `bench --json`.

    Raises ParallaxGenError, naming file and line (of JSON the row), on what is not such a file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParallaxGenError(f"cannot read {path}: {error}") from error
    rows = _json_rows(path, text) if text.lstrip().startswith("{") else _csv_rows(path, text)
    return [replace(row_from(texts, f"{path}, {where}"), origin=_origin(path, texts)) for where, texts in rows]


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
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


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows as a CSV file has them: in one level, numbers and flags as text."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ParallaxGenError(f"{path}: not JSON: {error}") from error
    rows = document.get("rows")
    if not isinstance(rows, list):
        raise ArgumentError(f"{path}, rows", shown(rows), "a list, as parallax-gen bench --json writes it")
    of_all = {name: document[name] for name in (*CARD, *TAKEN) if name in document}
    for number, row in enumerate(rows, start=1):
        where = f"row {number}"
        if not isinstance(row, dict) or not all(isinstance(row.get(part), dict) for part in ("spec", "shape")):
            raise ArgumentError(f"{path}, {where}", shown(row), "an object with a spec and a shape")
        flat = {**of_all, **row["spec"], "window": 0, **row["shape"], **row}
        if missing := [name for name in NEEDED if name not in flat]:
            raise ArgumentError(f"{path}, {where}", f"an object without {', '.join(missing)}", "a row of bench --json")
        yield where, {name: "" if value is None else _value_text(value) for name, value in flat.items()}


def _value_text(value: object) -> str:
    """A number or a flag as CSV has it. What a row holds beside them is not looked at, and may be of any depth."""
    return value if isinstance(value, str) else shown(value) if isinstance(value, dict | list) else str(value)


def _origin(path: Path, texts: Mapping[str, str]) -> Origin:
    card = next((texts[name] for name in CARD if texts.get(name)), "")
    with suppress(UnknownGpuError):  # one that is not in the table keeps its own name
        card = gpu_by_name(card).name if card else ""
    taken = ", ".join(f"{name} {texts[name]}" for name in TAKEN if texts.get(name))
    return Origin(path.name, card, taken, texts.get("command", ""))


@contextmanager
def _named(at: str) -> Iterator[None]:
    """Errors of a column in here name the line too."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(f"{at}: {error.argument}", error.got, error.allowed) from error


def _said(types: Mapping[str, str], texts: Mapping[str, str]) -> dict[str, Any]:
    """What is said of some fields, each read by its type: of a number or a flag an empty cell says nothing."""
    said = {name: of_type for name, of_type in types.items() if name in texts and (texts[name] or of_type == "str")}
    return {name: _READ[of_type](name, texts[name]) for name, of_type in said.items()}


def _int(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
        raise ArgumentError(name, shown(text), f"an int of 0 or more, of at most {_MOST_DIGITS} digits")
    return int(text)


def _bool(name: str, text: str) -> bool:
    if text not in _TRUTH:
        raise ArgumentError(name, repr(text), "True or False")
    return _TRUTH[text]


def _number(name: str, text: str) -> float:
    least, most = _BOUNDS.get(name, (0.0, sys.float_info.max))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise ArgumentError(name, shown(text), f"a number from {least:g} to {most:g}, or nothing")
    return value


def _lengths(name: str, text: str) -> tuple[int, ...]:
    try:
        return lengths_from_text(text)
    except ValueError as error:
        raise ArgumentError(name, shown(text), "keys of each sequence, such as 4096,7x128") from error


_READ: dict[str, Callable[[str, str], Any]] = {
    "str": lambda _, text: text,
    "int": _int,
    "float": _number,
    "float | None": _number,
    "tuple[int, ...]": _lengths,
    "bool": _bool,
}


# -- The file of `bench --csv`: what it holds is not timed again, and what is timed is added to it at once.

_ANY = Row("", "decode", "", _ANY_SPEC, Shape(1, 1, 1, 1, 1))
COLUMNS = list(to_flat(replace(_ANY, conditions=Conditions("", "", "", "", "", "", Effort()))))
WITHOUT_LENGTHS = [name for name in COLUMNS if name != "lengths"]  # of files from before there were any


class Ledger:
    """Rows by what they are of. Without a path it begins empty and keeps nothing.

    Rows are only ever added, a shape's at a time. Of a line that is not whole, from a machine that went down, nothing
    is kept. A file from before sequences had lengths is written anew, with their column.
    """

    def __init__(self, path: Path | None = None):
        """Raises ParallaxGenError if the file is another's, or cannot be read and written."""
        self._path = path
        self._rows: dict[object, Row] = {}
        if path is not None:
            try:
                for row in _opened(path):
                    self._rows[_identity(row)] = row
            except (OSError, UnicodeDecodeError, csv.Error) as error:
                raise ParallaxGenError(f"--csv: {path} cannot be used: {error}") from error

    def known(self, row: Row) -> Row | None:
        """What the file has of the same baseline, part, spec, shape, package and conditions."""
        return self._rows.get(_identity(row))

    def add(self, rows: Sequence[Row]) -> None:
        """Raises ParallaxGenError where the file cannot be written any more."""
        if self._path is not None:
            try:
                _append(self._path, _as_text(to_flat(row).values() for row in rows))
            except OSError as error:
                raise ParallaxGenError(f"--csv: {self._path} cannot be written: {error}") from error
        self._rows.update((_identity(row), row) for row in rows)


def _identity(row: Row) -> object:
    return row.contender, row.what, row.package, row.conditions


def _opened(path: Path) -> list[Row]:
    """The rows of a file, which is made where there is none, and mended: its last line is whole."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text:
        text = _as_text([COLUMNS])
        _append(path, text)
    columns = next(csv.reader([text.partition("\n")[0]]), [])
    if columns not in (COLUMNS, WITHOUT_LENGTHS):
        raise ParallaxGenError(f"--csv: {path} has other columns than bench writes: name another file")
    whole, _, tail = text.rpartition("\n")
    if whole and tail and not _rows([tail], columns):
        os.truncate(path, len(whole.encode()) + 1)  # what follows an open quotation mark would be lost
        text, tail = f"{whole}\n", ""
    _append(path, "\n" if tail else "")  # and thereby: can it be written?
    if columns == WITHOUT_LENGTHS:
        replace_file(path.resolve(), _widened(text))  # a link stays one
    return _rows(io.StringIO(text.partition("\n")[2], newline=""), columns)


def _widened(text: str) -> str:
    """A file's text with an empty cell for lengths in every row."""
    at = COLUMNS.index("lengths")
    _, *lines = csv.reader(io.StringIO(text, newline=""))
    return _as_text([COLUMNS, *([*line[:at], "", *line[at:]] for line in lines)])


def _rows(lines: Iterable[str], columns: list[str]) -> list[Row]:
    """Those that can be read: someone may have had a hand in the file."""
    found = []
    for texts in csv.DictReader(lines, columns):
        if None not in texts.values():  # for a cell that is missing
            with suppress(ArgumentError):
                found.append(from_flat(texts))
    return found


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def _as_text(lines: Iterable[Iterable[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
