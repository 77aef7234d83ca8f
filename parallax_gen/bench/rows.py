"""The rows of `bench`, their conditions, and their format in files. A row is one part of one baseline at one shape."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from parallax_gen.describe import lengths_from_text, lengths_to_text
from parallax_gen.errors import ArgumentError, ParallaxGenError, UnknownGpuError
from parallax_gen.memory.bounds import NUMBERS, shown
from parallax_gen.memory.old import spec_of_record
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Shape, within_bounds
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import rate_unit
from parallax_gen.problem.workloads import TRAINING


@dataclass(frozen=True)
class Effort:
    """How much time a benchmark spends.

    rounds     how often all baselines are timed in turn, so that drift affects all of them equally
    timed_ms   approximate time of a baseline per round
    oracle     "whole": errors over all results; "sample": over the first and last sequence and kv head; or "none"
    few_calls  slow baselines are timed once with few calls, and Triton's autotuners time each config with few calls
    quick      fewer shapes, for a first look; such times are not for publication
    """

    rounds: int = 3
    timed_ms: float = 60.0
    oracle: str = "whole"
    few_calls: bool = False
    quick: bool = False


FULL_EFFORT = Effort()
GRID_EFFORT = Effort(rounds=1, timed_ms=30.0, oracle="sample", few_calls=True)
QUICK_EFFORT = Effort(rounds=1, timed_ms=10.0, oracle="sample", few_calls=True, quick=True)


@dataclass(frozen=True)
class Conditions:
    """The conditions of a measurement. A stored time is reused if all of them except the command are equal."""

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
        """All fields and the effort's fields as a dict without nesting, by their names in files."""
        scalars = {name: value for name, value in vars(self).items() if name != "effort"}
        return {**scalars, **_to_stored(asdict(self.effort))}


@dataclass(frozen=True)
class Provenance:
    """The file that a row was read from, and the conditions that the file states.

    file        its name: baselines are only compared within a file, where they ran in one process on the same inputs
    gpu         the card's short name; "" if the file does not say
    conditions  as text: the file's values of CONDITION_COLUMNS
    command     the command that wrote the file; "" if the file does not say
    """

    file: str = ""
    gpu: str = ""
    conditions: str = ""
    command: str = field(default="", compare=False)


@dataclass(frozen=True)
class Row:
    """One part of one baseline at one shape.

    op             "forward", "decode" or TRAINING
    part           the timed part: a key of PARTS[op] in bench/parts.py
    spec           of the forward or the decode
    time_us        median over the rounds of medians by the protocol of tuning/workers/measure.py; None if the baseline
                   does not run
    p20_us, p80_us median over the rounds of the 20th and 80th percentiles
    rate           TFLOP/s, or GB/s for decode, counting the work of Parallax (of softmax for a softmax baseline)
    error          ||result - oracle|| / ||oracle|| of the output, or the largest over the gradients; None for softmax
                   baselines and with oracle "none"
    checked        number of (sequence, kv head) pairs that the error covers
    note           why there is no time, or how the row was timed differently from the others
    package        the baseline's packages and their versions; for ours the hash of the kernels
    conditions     None until they are known
    lengths        for decode with per-sequence lengths: the number of keys of each sequence; () if all have the shape's
    peaked_error   the output's error on `oracle_check.peaked_inputs`; None for a backward, where `error` is
                   None, for fewer than `peaked.FEWEST_KEYS` keys, and if memory did not suffice
    provenance     set for rows that `read_rows` read
    """

    baseline: str
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
    peaked_error: float | None = None
    provenance: Provenance = Provenance()

    @property
    def compared_at(self) -> tuple[object, ...]:
        """Rows of several baselines are compared if this is equal."""
        return self.provenance, self.op, self.part, self.spec, self.shape, self.lengths


_SCALAR_FIELDS = [f.name for f in fields(Row) if f.name not in ("spec", "shape", "conditions", "provenance")]

# Fields whose name in files differs: files keep the first names.
_NAME_IN_FILES = {"baseline": "contender", "few_calls": "hasty"}
_FIELD_NAMES = {stored: name for name, stored in _NAME_IN_FILES.items()}
# A baseline's name in older files -> today's.
_TODAYS_BASELINES = {f"official {kind}": f"parallax-kernel {kind}" for kind in ("CuTeDSL", "Triton", "Helion")}


def _to_stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by their names in files."""
    return {_NAME_IN_FILES.get(name, name): value for name, value in values.items()}


def _from_stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a file by their names in Python."""
    return {_FIELD_NAMES.get(name, name): value for name, value in values.items()}


def to_json(row: Row) -> dict[str, Any]:
    conditions = {} if row.conditions is None else row.conditions.flat()
    scalars = _to_stored({name: getattr(row, name) for name in _SCALAR_FIELDS}) | {
        "lengths": lengths_to_text(row.lengths)
    }
    nested = {"spec": row.spec.to_dict(), "shape": row.shape.to_dict()}
    return {**scalars, **nested, "rate_unit": rate_unit(row.spec.op), **conditions}


def to_flat(row: Row) -> dict[str, Any]:
    """A row as a dict without nesting, with every field. `window` is the shape's number; `op` is the row's."""
    document = to_json(row)
    del document["spec"], document["shape"]
    return {**row.spec.flat(), **asdict(row.shape), **document}


# -- Reading: a file's content is checked like user input.

# The columns that every row needs. Others may be missing; a missing flag of a kernel is off.
SHAPE_COLUMNS = tuple(f.name for f in fields(Shape))
REQUIRED_COLUMNS = (
    "op",
    "part",
    "contender",
    "head_dim",
    "dtype",
    "time_us",
    *(name for name in SHAPE_COLUMNS if name != "window"),
)
CARD_COLUMNS = ("gpu", "card")  # columns or JSON fields that name the card
# The conditions, as far as a file states them: rows of different conditions are not compared.
CONDITION_COLUMNS = (
    "card",
    "parallax_gen",
    "torch",
    "triton",
    "cuda",
    "rounds",
    "timed_ms",
    "oracle",
    "hasty",
    "quick",
)
_ANY_SPEC = KernelSpec("decode", 64, "bf16")
_SPEC_TYPES = {
    name: type(value).__name__
    for name, value in _ANY_SPEC.flat().items()
    if name not in ("op", "head_dim", "group", "window")  # these come from the row or the shape
}
_ROW_TYPES = _to_stored({f.name: str(f.type) for f in fields(Row) if f.name in _SCALAR_FIELDS})
_CONDITIONS_TYPES = {f.name: str(f.type) for f in fields(Conditions) if f.name != "effort"}
_EFFORT_TYPES = _to_stored({f.name: str(f.type) for f in fields(Effort)})
_BOOLS = {"True": True, "False": False}
_MAX_DIGITS = 20  # in an int
_BOUNDS = {
    **dict.fromkeys(("time_us", "p20_us", "p80_us"), NUMBERS["time_us"]),
    **dict.fromkeys(("error", "peaked_error"), NUMBERS["error"]),
}


def row_from(texts: Mapping[str, str], location: str) -> Row:
    """The row in a line of a file, given as text by column; without conditions.

    Raises ArgumentError that names the line, `location`, and the column. Times must lie within the bounds of
    memory/bounds.py, so that their rates and ratios are finite.
    """
    with _name_location(location):
        shape = within_bounds(Shape(**{name: _int(name, texts.get(name) or "0") for name in SHAPE_COLUMNS}))
        head_dim, flags = _int("head_dim", texts["head_dim"]), _parsed_fields(_SPEC_TYPES, texts)
        op = "forward" if texts["op"] == TRAINING else texts["op"]
        flags["window"] = shape.window > 0
        spec = spec_of_record(op, flags.pop("ragged", False), head_dim=head_dim, group=shape.group, **flags)
        values = _from_stored(_parsed_fields(_ROW_TYPES, texts))
        values["baseline"] = _TODAYS_BASELINES.get(values["baseline"], values["baseline"])
        return Row(spec=spec, shape=shape, **values)


def from_flat(texts: Mapping[str, str]) -> Row:
    """The row, with conditions, that `to_flat` wrote; `texts` are its fields as text. Raises ArgumentError."""
    effort, conditions = (
        _from_stored({name: _PARSERS[kind](name, texts[name]) for name, kind in types.items()})
        for types in (_EFFORT_TYPES, _CONDITIONS_TYPES)
    )
    return replace(row_from(texts, "the row"), conditions=Conditions(effort=Effort(**effort), **conditions))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of `bench --csv` or `bench --json`.

    Raises ParallaxGenError, naming the file and the line (in JSON the row), if it is not such a file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParallaxGenError(f"cannot read {path}: {error}") from error
    rows = _json_rows(path, text) if text.lstrip().startswith("{") else _csv_rows(path, text)
    try:
        return [
            replace(row_from(cells, f"{path}, {where}"), provenance=_provenance(path, cells)) for where, cells in rows
        ]
    except ArgumentError as error:  # of the file, not of an argument
        raise ParallaxGenError(str(error)) from error


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        names = reader.fieldnames or []
        missing = [name for name in REQUIRED_COLUMNS if name not in names]
        if missing:
            got = f"the columns {', '.join(names)}" if names else "no columns"
            raise ArgumentError(f"{path}, line 1", got, f"a CSV file of parallax-gen bench, with {', '.join(missing)}")
        for row in reader:
            location = f"line {reader.line_num}"
            if None in row or None in row.values():  # more cells than columns, or fewer
                raise ArgumentError(f"{path}, {location}", "too many or too few cells", f"{len(names)}, as in line 1")
            yield location, dict(row)
    except csv.Error as error:
        raise ParallaxGenError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows as dicts without nesting, with numbers and flags as text, as in a CSV file."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ParallaxGenError(f"{path}: not JSON: {error}") from error
    rows = document.get("rows")
    if not isinstance(rows, list):
        raise ArgumentError(f"{path}, rows", shown(rows), "a list, as parallax-gen bench --json writes it")
    shared = {name: document[name] for name in (*CARD_COLUMNS, *CONDITION_COLUMNS) if name in document}
    for number, row in enumerate(rows, start=1):
        location = f"row {number}"
        if not isinstance(row, dict) or not all(isinstance(row.get(part), dict) for part in ("spec", "shape")):
            raise ArgumentError(f"{path}, {location}", shown(row), "an object with a spec and a shape")
        flat = {**shared, **row["spec"], "window": 0, **row["shape"], **row}
        if missing := [name for name in REQUIRED_COLUMNS if name not in flat]:
            raise ArgumentError(
                f"{path}, {location}", f"an object without {', '.join(missing)}", "a row of bench --json"
            )
        yield location, {name: "" if value is None else _value_text(value) for name, value in flat.items()}


def _value_text(value: object) -> str:
    """A number or a flag as CSV text. Other values are not used; they may be nested to any depth."""
    return value if isinstance(value, str) else shown(value) if isinstance(value, dict | list) else str(value)


def _provenance(path: Path, texts: Mapping[str, str]) -> Provenance:
    card = next((texts[name] for name in CARD_COLUMNS if texts.get(name)), "")
    with suppress(UnknownGpuError):  # a card that is not in the table keeps its own name
        card = gpu_by_name(card).name if card else ""
    conditions = ", ".join(f"{name} {texts[name]}" for name in CONDITION_COLUMNS if texts.get(name))
    return Provenance(path.name, card, conditions, texts.get("command", ""))


@contextmanager
def _name_location(location: str) -> Iterator[None]:
    """Add the line, `location`, to ArgumentErrors that name a column."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(f"{location}: {error.argument}", error.got, error.allowed) from error


def _parsed_fields(types: Mapping[str, str], texts: Mapping[str, str]) -> dict[str, Any]:
    """The fields that are present, each parsed by its type. An empty cell of a number or a flag counts as missing."""
    present = {name: kind for name, kind in types.items() if name in texts and (texts[name] or kind == "str")}
    return {name: _PARSERS[kind](name, texts[name]) for name, kind in present.items()}


def _int(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS):
        raise ArgumentError(name, shown(text), f"an int of 0 or more, of at most {_MAX_DIGITS} digits")
    return int(text)


def _bool(name: str, text: str) -> bool:
    if text not in _BOOLS:
        raise ArgumentError(name, repr(text), "True or False")
    return _BOOLS[text]


def _number(name: str, text: str) -> float:
    minimum, maximum = _BOUNDS.get(name, (0.0, sys.float_info.max))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not minimum <= value <= maximum:
        raise ArgumentError(name, shown(text), f"a number from {minimum:g} to {maximum:g}, or an empty cell")
    return value


def _lengths(name: str, text: str) -> tuple[int, ...]:
    try:
        return lengths_from_text(text)
    except ValueError as error:
        raise ArgumentError(name, shown(text), "the number of keys of each sequence, such as 4096,7x128") from error


_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "str": lambda _, text: text,
    "int": _int,
    "float": _number,
    "float | None": _number,
    "tuple[int, ...]": _lengths,
    "bool": _bool,
}
