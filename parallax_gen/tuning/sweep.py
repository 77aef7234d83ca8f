"""Recorded sweeps: what every config of one key came to, in one small file, for searches to be replayed on.

A file is lines of JSON, gzipped where its name ends in .gz. The first has what all have in common: the key in clear,
the shape, where and when it was measured, whether it is whole, and the columns. Each of the others is one config: its
knobs in their order, then outcome, time and resources.
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

from parallax_gen.errors import ArgumentError, ParallaxGenError, StoreError
from parallax_gen.memory.keys import Key
from parallax_gen.memory.results import Result
from parallax_gen.problem.config import CONFIG_OF_OP, KernelConfig, config_from_dict
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape, representative
from parallax_gen.problem.space import KNOBS, every_config

T = TypeVar("T")

FORMAT = 1
COLUMNS = ("outcome", "time_us", "registers", "spills", "shared_bytes", "compile_s")
TIMED = ("ok", "slow")  # a slow one has the median of a few replays


@dataclass(frozen=True)
class Sweep:
    """What was tried of one key. whole: every config that there was then. Results are of one key and shape."""

    results: tuple[Result, ...]
    whole: bool

    @property
    def key(self) -> Key:
        return self.results[0].key

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
    """The sweep that a key's results are, such as `store.results(key)`: only what `tells` is in it.

    Raises ArgumentError where they are of several keys or shapes, or nothing was timed.
    """
    tried = tuple(sorted((r for r in results if tells(r)), key=_knobs))
    if not any(r.outcome in TIMED and r.time_us for r in tried):
        raise ArgumentError("results", f"{len(tried)} that were tried, none of them timed", "those of a key's tune")
    for name, values in (("key", {r.key for r in tried}), ("shape", {_shape_of(r) for r in tried})):
        if len(values) > 1:
            raise ArgumentError("results", f"{len(values)} values of {name}", f"those of one {name}")
    return Sweep(tried, whole=set(every_config(tried[0].key.spec, gpu)) <= {r.config for r in tried})


def write_sweep(sweep: Sweep, path: Path) -> None:
    """Write a sweep's file. Times are kept to five digits: more than a timing is worth."""
    newest = max(sweep.results, key=lambda r: r.created_at)
    header = {
        "format": FORMAT,
        "key": sweep.key.flat(),
        "shape": sweep.shape.to_dict(),
        "source": newest.source,
        "created_at": newest.created_at,
        "whole": sweep.whole,
        "configs": len(sweep.results),
        "columns": [*_names(sweep.key), *COLUMNS],
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
    return result.shape or representative(result.key.bucket, result.key.spec.group)


def _parse(path: Path, number: int, line: bytes, parsed: Callable[[object], T]) -> T:
    try:
        return parsed(json.loads(line))
    except (ParallaxGenError, ValueError, RecursionError) as error:
        raise StoreError(f"{path}, line {number}: not of a sweep: {error}") from error


def _names(key: Key) -> list[str]:
    return [knob.name for knob in KNOBS[key.spec.op]]


def _knobs(result: Result) -> list[tuple[str, Any]]:
    return sorted(asdict(result.config).items())


def _to_line(result: Result) -> list[Any]:
    values = [getattr(result.config, name) for name in _names(result.key)]
    values += [getattr(result, name) for name in COLUMNS]
    return [float(f"{value:.5g}") if isinstance(value, float) else value for value in values]


def _header(data: object) -> dict[str, Any]:
    """The first line, with key and shape as objects. Raises ArgumentError."""
    kinds = {"format": int, "key": dict, "shape": dict, "source": str, "created_at": str}
    kinds |= {"whole": bool, "configs": int, "columns": list}
    if not isinstance(data, dict) or set(data) != set(kinds):
        raise ArgumentError("line", repr(data)[:80], f"an object of exactly {sorted(kinds)}")
    for name, kind in kinds.items():
        if type(data[name]) is not kind:
            raise ArgumentError(name, repr(data[name]), kind.__name__)
    if data["format"] != FORMAT:
        raise ArgumentError("format", data["format"], str(FORMAT))
    try:
        key = Key.from_flat(data["key"])
    except KeyError as missing:
        raise ArgumentError("key", data["key"], f"every field of a key, in clear ({missing})") from missing
    # A file from before a knob came has no column for it, and its configs have the knob's default.
    needed = {f.name for f in fields(CONFIG_OF_OP[key.spec.op]) if f.default is MISSING}
    knobs = [name for name in _names(key) if name in needed or name in data["columns"]]
    if data["columns"] != [*knobs, *COLUMNS]:
        raise ArgumentError("columns", data["columns"], str([*_names(key), *COLUMNS]))
    return {**data, "key": key, "shape": Shape.from_dict(data["shape"])}


def _from_line(header: dict[str, Any], data: object) -> Result:
    key, columns = header["key"], header["columns"]
    if not isinstance(data, list) or len(data) != len(columns):
        raise ArgumentError("line", repr(data)[:80], f"a list of {len(columns)}, one a column")
    values = dict(zip(columns, data, strict=True))
    config = config_from_dict(key.spec.op, {name: values.pop(name) for name in _names(key) if name in values})
    common = {name: header[name] for name in ("key", "shape", "source", "created_at")}
    return Result(config=config, **common, **values)
