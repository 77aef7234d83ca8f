"""Recorded sweeps: what every config of one place came to, in one small file, for searches to be replayed on.

A file is lines of JSON, gzipped where its name ends in .gz. The first has what all have in common: the place in clear,
the toolchain, the shape, where and when it was measured, whether it is whole, and the columns. Each of the others is
one config: its knobs in their order, then outcome, time and resources.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from parallax_gen.errors import ArgumentError, StoreError
from parallax_gen.memory.bounds import shown
from parallax_gen.memory.place import Place
from parallax_gen.memory.result import LONGEST_REASON, NO_RESULT, Evidence, Result, of_before
from parallax_gen.problem.config import CONFIG_OF_OP, KernelConfig, config_from_dict
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape, representative
from parallax_gen.problem.space import KNOBS, every_config

T = TypeVar("T")

FORMAT = 2  # 1 had, for the place and the toolchain, the key of records from before fingerprints
COLUMNS = ("outcome", "time_us", "registers", "spills", "shared_bytes", "compile_s")
TIMED = ("ok", "slow")  # a slow one has the median of a few replays


@dataclass(frozen=True)
class Sweep:
    """What was tried of one place. whole: every config that there was then. Results are of one shape and toolchain."""

    results: tuple[Result, ...]
    whole: bool

    @property
    def place(self) -> Place:
        return self.results[0].place

    @property
    def shape(self) -> Shape:
        return _shape_of(self.results[0])

    @property
    def costs(self) -> dict[KernelConfig, float | None]:
        """Microseconds of each config, None of one that failed."""
        return {r.config: r.time_us if r.outcome in TIMED else None for r in self.results}

    @property
    def best_us(self) -> float:
        return min(time_us for time_us in self.costs.values() if time_us is not None)


def tells(result: Result) -> bool:
    """Whether its config was tried, which one that was only predicted, or that the machine failed, was not."""
    return result.outcome != "predicted" and not result.of_machine


def sweep_of(results: Iterable[Result], gpu: Gpu) -> Sweep:
    """The sweep that a place's results are: only what `tells` is in it, and of each config the newest.

    Raises ArgumentError where they are of several places, toolchains or shapes, or nothing was timed.
    """
    told = sorted((r for r in results if tells(r)), key=lambda r: r.created)
    tried = tuple(sorted({r.config: r for r in told}.values(), key=_knobs))
    if not any(r.outcome in TIMED and r.time_us for r in tried):
        raise ArgumentError("results", f"{len(tried)} that were tried, none of them timed", "those of a place's tune")
    common: dict[str, set[object]] = {
        "place": {r.place for r in told},
        "toolchain": {r.evidence.toolchain for r in told},
        "shape": {_shape_of(r) for r in tried},
    }
    for name, values in common.items():
        if len(values) > 1:
            raise ArgumentError("results", f"{len(values)} values of {name}", f"those of one {name}")
    return Sweep(tried, whole=set(every_config(tried[0].place.spec, gpu)) <= {r.config for r in tried})


def write_sweep(sweep: Sweep, path: Path) -> None:
    """Write a sweep's file. Times are kept to five digits: more than a timing is worth."""
    newest = max(sweep.results, key=lambda r: r.created_at)
    header = {
        "format": FORMAT,
        "place": sweep.place.flat(),
        "triton": newest.evidence.triton,
        "cuda": newest.evidence.cuda,
        "protocol": newest.evidence.protocol,
        "shape": sweep.shape.to_dict(),
        "source": newest.source,
        "created_at": newest.created_at,
        "whole": sweep.whole,
        "configs": len(sweep.results),
        "columns": [*_names(sweep.place), *COLUMNS],
    }
    lines = [json.dumps(header), *(json.dumps(_to_line(r), separators=(",", ":")) for r in sweep.results)]
    data = ("\n".join(lines) + "\n").encode()
    try:
        # Without the time of day in it, the same sweep always gives the same file.
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}") from error


def read_sweep(path: Path) -> Sweep:
    """The sweep that `write_sweep` wrote. Raises StoreError, naming file and line, on anything else."""
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()
    except (OSError, EOFError, zlib.error) as error:
        raise StoreError(f"cannot read {path}: {error}") from error
    header = _parse(path, 1, lines[0] if lines else b"", _header)
    from_line = partial(_from_line, header)
    results = [_parse(path, number, line, from_line) for number, line in enumerate(lines[1:], start=2)]
    if len(results) != header["configs"] or len({r.config for r in results}) != len(results):
        raise StoreError(
            f"{path}: {len(results)} lines of configs, some perhaps twice; line 1 says {header['configs']}"
        )
    sweep = Sweep(tuple(results), header["whole"])
    if not any(sweep.costs.values()):
        raise StoreError(f"{path}: none of its configs was timed")
    return sweep


def _shape_of(result: Result) -> Shape:
    """The sizes it was timed at: those that its bucket is tuned at where the row does not say."""
    return result.shape or representative(result.place.bucket, result.place.spec.group)


def _parse(path: Path, number: int, line: bytes, parsed: Callable[[object], T]) -> T:
    try:
        return parsed(json.loads(line))
    except NO_RESULT as error:
        raise StoreError(f"{path}, line {number}: not of a sweep: {str(error)[:LONGEST_REASON]}") from error


def _names(place: Place) -> list[str]:
    return [knob.name for knob in KNOBS[place.spec.op]]


def _knobs(result: Result) -> list[tuple[str, Any]]:
    return sorted(asdict(result.config).items())


def _to_line(result: Result) -> list[Any]:
    values = [getattr(result.config, name) for name in _names(result.place)]
    values += [getattr(result, name) for name in COLUMNS]
    return [float(f"{value:.5g}") if isinstance(value, float) else value for value in values]


def _header(data: object) -> dict[str, Any]:
    """The first line, with place, evidence and shape as objects. Raises ArgumentError."""
    if isinstance(data, dict) and data.get("format") == 1:
        data = _of_format_1(data)
    kinds = {"format": int, "place": dict, "triton": str, "cuda": str, "protocol": int}
    kinds |= {"shape": dict, "source": str, "created_at": str, "whole": bool, "configs": int, "columns": list}
    if not isinstance(data, dict) or set(data) != set(kinds):
        raise ArgumentError("line", shown(data), f"an object of exactly {sorted(kinds)}")
    for name, kind in kinds.items():
        if type(data[name]) is not kind:
            raise ArgumentError(name, shown(data[name]), kind.__name__)
    if data["format"] != FORMAT:
        raise ArgumentError("format", data["format"], str(FORMAT))
    place = Place.from_flat(data["place"])
    # A file from before a knob came has no column for it, and its configs have the knob's default.
    needed = {f.name for f in fields(CONFIG_OF_OP[place.spec.op]) if f.default is MISSING}
    knobs = [name for name in _names(place) if name in needed or name in data["columns"]]
    if data["columns"] != [*knobs, *COLUMNS]:
        raise ArgumentError("columns", shown(data["columns"]), str([*_names(place), *COLUMNS]))
    evidence = Evidence("", "", data["triton"], data["cuda"], data["protocol"])
    return {**data, "place": place, "evidence": evidence, "shape": Shape.from_dict(data["shape"])}


def _of_format_1(data: dict[str, Any]) -> dict[str, Any]:
    record = of_before({"key": data.get("key")})
    evidence = {name: record["evidence"][name] for name in ("triton", "cuda", "protocol")}
    rest = {name: value for name, value in data.items() if name != "key"}
    return rest | {"format": FORMAT, "place": record["place"]} | evidence


def _from_line(header: dict[str, Any], data: object) -> Result:
    place, columns = header["place"], header["columns"]
    if not isinstance(data, list) or len(data) != len(columns):
        raise ArgumentError("line", shown(data), f"a list of {len(columns)}, one a column")
    values = dict(zip(columns, data, strict=True))
    config = config_from_dict(place.spec.op, {name: values.pop(name) for name in _names(place) if name in values})
    for knob in KNOBS[place.spec.op]:  # a value that is none any more may be there, but no tile of nothing
        value, least = getattr(config, knob.name), min((v for v in knob.values if isinstance(v, int)), default=0)
        if isinstance(value, int) and value < least:
            raise ArgumentError(knob.name, value, f"an int of {least} or more")
    common = {name: header[name] for name in ("place", "evidence", "shape", "source", "created_at")}
    return Result(config=config, **common, **values)
