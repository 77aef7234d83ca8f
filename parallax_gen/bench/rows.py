"""`bench`'s rows: one contender at one shape, and where and how its figures were taken; to text, and back."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from parallax_gen.describe import from_text, to_text
from parallax_gen.errors import ArgumentError, ParallaxGenError
from parallax_gen.files import replace_file
from parallax_gen.memory.bounds import check_number
from parallax_gen.memory.old import op_named
from parallax_gen.problem.shapes import Shape, within_bounds
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import rate_unit
from parallax_gen.problem.workloads import TRAINING

OURS = "parallax_gen"
SOFTMAX = ("SDPA flash", "SDPA cuDNN", "flash-attn 2", "flash-attn 3", "flash-attn 4")
CONTENDERS = (OURS, *SOFTMAX, "official CuTeDSL", "official Triton", "official Helion", "fla")


@dataclass(frozen=True)
class Effort:
    """How much time is spent on figures.

    rounds    each contender is timed so often, in turn: what drifts, drifts for all
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
class Row:
    """One contender at one shape, and one part of what it does there.

    op             "forward", "decode" or TRAINING
    part           what was timed, of compare.PARTS[op]
    spec           the forward's or the decode's
    time_us        median of the rounds' medians, by tuning/workers/measure.py's protocol; None where it does not run
    p20_us, p80_us likewise, of the rounds' 20th and 80th percentiles
    rate           TFLOP/s, GB/s for decode, of the work of Parallax (of softmax for a softmax peer)
    error          ||found - oracle|| / ||oracle|| of the output, or the largest of the gradients'; None for softmax
                   peers, and where none was asked for
    checked        pairs of a sequence and a kv head that the error is of
    note           why there is no time, or what is unlike others in how it was timed
    package        the contender's packages and their versions; of ours the kernels' hash
    conditions     None while they are not yet known
    lengths        of ragged decode, the keys of each sequence; () where all have as many as the shape says
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

    @property
    def what(self) -> tuple[object, ...]:
        """What contenders are compared at."""
        return self.op, self.part, self.spec, self.shape, self.lengths


_OWN = [f.name for f in fields(Row) if f.name not in ("spec", "shape", "conditions")]  # not nested


def to_json(row: Row) -> dict[str, Any]:
    conditions = {} if row.conditions is None else row.conditions.flat()
    own = {name: getattr(row, name) for name in _OWN} | {"lengths": to_text(row.lengths)}
    sizes = {"spec": row.spec.to_dict(), "shape": row.shape.to_dict()}
    return {**own, **sizes, "rate_unit": rate_unit(row.spec.op), **conditions}


def to_flat(row: Row) -> dict[str, Any]:
    """In one level, with every field in every row. The window is a number, that of the shape; op is the row's."""
    document = to_json(row)
    del document["spec"], document["shape"]
    return {**row.spec.flat(), **asdict(row.shape), **document}


_READ: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
    "tuple[int, ...]": from_text,
    "bool": lambda text: {"True": True, "False": False}[text],
}


def from_flat(texts: Mapping[str, str]) -> Row:
    """The row that `to_flat` wrote, from its fields as text. Raises KeyError, ValueError or TypeError.

    Times are within the bounds of memory/bounds.py, so that rates and ratios of them are numbers.
    """

    def read(kind: type[Any], **known: Any) -> Any:
        """The fields that are not nested in others, each by its type; `known` are those that need no reading."""
        simple = {f.name: str(f.type) for f in fields(kind) if f.name not in known}
        return kind(**{name: _READ[of_type](texts[name]) for name, of_type in simple.items()}, **known)

    shape = within_bounds(read(Shape))
    op = "forward" if texts["op"] == TRAINING else op_named(texts["op"], _READ["bool"](texts["ragged"]))
    spec = read(KernelSpec, op=op, window=shape.window > 0)
    row: Row = read(Row, spec=spec, shape=shape, conditions=read(Conditions, effort=read(Effort)))
    for time_us in (row.time_us, row.p20_us, row.p80_us):
        if time_us is not None:
            check_number("time_us", time_us)
    if row.rate is not None and not 0 <= row.rate < math.inf:
        raise ArgumentError("rate", row.rate, "a number of 0 or more")
    return row


# -- The file of `bench --csv`: what it holds is not timed again, and what is timed is added to it at once.

_ANY = Row("", "decode", "", KernelSpec("decode", 64, "bf16"), Shape(1, 1, 1, 1, 1))
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
        """What the file has of the same contender, part, spec, shape, package and conditions."""
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
    for line in csv.DictReader(lines, columns):
        with suppress(KeyError, ValueError, TypeError):  # None for a field that is missing
            found.append(from_flat({"lengths": ""} | line))
    return found


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def _as_text(lines: Iterable[Iterable[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
