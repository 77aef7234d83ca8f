"""Recorded sweeps: one small file with the results of every config of one place, on which searches are replayed.

A file is lines of JSON, gzipped if its name ends in .gz. The first line is a header with the place, the toolchain, the
shape, the card and time of measurement, whether the sweep is whole, and the columns. Each other line is one config: its
knobs in their order, then outcome, time and resources.
"""

from __future__ import annotations

import gzip
import json
import statistics
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from parallax_gen.errors import ArgumentError, StoreError
from parallax_gen.memory.bounds import shown
from parallax_gen.memory.old import TODAYS_NAMES, config_of_record, upgrade_record
from parallax_gen.memory.place import Place
from parallax_gen.memory.result import LONGEST_REASON, MALFORMED, Evidence, Result
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.ops.space import default_config, every_config
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.shapes import Shape, representative
from parallax_gen.tuning.search.cost_model import guess_us
from parallax_gen.tuning.search.search import SAMPLERS, Search
from parallax_gen.tuning.workers.pool import usable_cpus

T = TypeVar("T")

FORMAT = 2  # format 1 had the key of records from before fingerprints instead of the place and the toolchain
COLUMNS = ("outcome", "time_us", "registers", "spills", "shared_bytes", "compile_s")


@dataclass(frozen=True)
class Sweep:
    """The results of one place, shape and toolchain. whole: whether every config of the space of that time has one."""

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
        """The microseconds of each config, None for one that failed."""
        return {r.config: r.time_us if r.outcome.timed else None for r in self.results}

    @property
    def best_us(self) -> float:
        return min(time_us for time_us in self.costs.values() if time_us is not None)


def sweep_of(results: Iterable[Result], gpu: Gpu) -> Sweep:
    """The sweep of a place's results: the newest informative result of each config.

    Raises ArgumentError if they are of several places, toolchains or shapes, or if none was timed.
    """
    tried = sorted((r for r in results if r.informative), key=lambda r: r.created)
    newest = tuple(sorted({r.config: r for r in tried}.values(), key=_knobs))
    if not any(r.outcome.timed and r.time_us for r in newest):
        raise ArgumentError(
            "results", f"{len(newest)} tried configs, none of them timed", "the results of a place's tune"
        )
    common: dict[str, set[object]] = {
        "place": {r.place for r in tried},
        "toolchain": {r.evidence.toolchain for r in tried},
        "shape": {_shape_of(r) for r in newest},
    }
    for name, values in common.items():
        if len(values) > 1:
            raise ArgumentError("results", f"{len(values)} values of {name}", f"results of one {name}")
    return Sweep(newest, whole=set(every_config(newest[0].place.spec, gpu)) <= {r.config for r in newest})


def write_sweep(sweep: Sweep, path: Path) -> None:
    """Write a sweep's file. Times are rounded to five digits, more than a timing's precision."""
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
        # mtime=0: equal sweeps give equal files.
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}") from error


def read_sweep(path: Path) -> Sweep:
    """Read the file of `write_sweep`. Raises StoreError, naming file and line, on anything else."""
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
            f"{path}: {len(results)} configs, possibly with duplicates, but line 1 says {header['configs']}"
        )
    sweep = Sweep(tuple(results), header["whole"])
    if not any(sweep.costs.values()):
        raise StoreError(f"{path}: none of its configs was timed")
    return sweep


def _shape_of(result: Result) -> Shape:
    """The shape that a result was timed at: by default its bucket's representative."""
    return result.shape or representative(result.place.bucket, result.place.spec.group)


def _parse(path: Path, number: int, line: bytes, convert: Callable[[object], T]) -> T:
    try:
        return convert(json.loads(line))
    except MALFORMED as error:
        raise StoreError(f"{path}, line {number}: not a line of a sweep: {str(error)[:LONGEST_REASON]}") from error


def _names(place: Place) -> list[str]:
    return [knob.name for knob in op_of(place.spec).knobs]


def _knobs(result: Result) -> list[tuple[str, Any]]:
    return sorted(asdict(result.config).items())


def _to_line(result: Result) -> list[Any]:
    values = [getattr(result.config, name) for name in _names(result.place)]
    values += [getattr(result, name) for name in COLUMNS]
    return [float(f"{value:.5g}") if isinstance(value, float) else value for value in values]


def _header(data: object) -> dict[str, Any]:
    """Parse the header: place, evidence and shape become objects. Raises ArgumentError."""
    if isinstance(data, dict) and data.get("format") == 1:
        data = _upgrade_format_1(data)
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
    # A file from before a knob was added has no column for it, and its configs have the knob's default.
    needed = {f.name for f in fields(op_of(place.spec).config) if f.default is MISSING}
    columns = [TODAYS_NAMES.get(name, name) if isinstance(name, str) else name for name in data["columns"]]
    knobs = [name for name in _names(place) if name in needed or name in columns]
    if columns != [*knobs, *COLUMNS]:
        raise ArgumentError("columns", shown(data["columns"]), str([*_names(place), *COLUMNS]))
    evidence = Evidence("", "", data["triton"], data["cuda"], data["protocol"])
    return {**data, "place": place, "evidence": evidence, "shape": Shape.from_dict(data["shape"])}


def _upgrade_format_1(data: dict[str, Any]) -> dict[str, Any]:
    record = upgrade_record({"key": data.get("key")})
    evidence = {name: record["evidence"][name] for name in ("triton", "cuda", "protocol")}
    rest = {name: value for name, value in data.items() if name != "key"}
    return rest | {"format": FORMAT, "place": record["place"]} | evidence


def _from_line(header: dict[str, Any], data: object) -> Result:
    place, columns = header["place"], header["columns"]
    if not isinstance(data, list) or len(data) != len(columns):
        raise ArgumentError("line", shown(data), f"a list of {len(columns)} values, one per column")
    values = dict(zip(columns, data, strict=True))
    config = config_of_record(place.spec.op, {name: values.pop(name) for name in columns if name not in COLUMNS})
    for knob in op_of(place.spec).knobs:  # values removed from the space are allowed, but not a tile of size 0
        value, minimum = getattr(config, knob.name), min((v for v in knob.values if isinstance(v, int)), default=0)
        if isinstance(value, int) and value < minimum:
            raise ArgumentError(knob.name, value, f"an int of {minimum} or more")
    common = {name: header[name] for name in ("place", "evidence", "shape", "source", "created_at")}
    return Result(config=config, **common, **values)


# -- Searches replayed on recorded sweeps, without a GPU: after how many trials each sampler is near the best config.

TUNER_STRATEGY = "ours"  # the strategy of the tuner: the default config first, then the default sampler
STRATEGIES = (TUNER_STRATEGY, *SAMPLERS)
NEAR = 0.02  # a regret: two measurements of one config may differ by this fraction


@dataclass(frozen=True)
class Curve:
    """The regret of one strategy on one sweep after each trial: median and quartiles over all seeds.

    The regret is the time of the best config so far over the sweep's best time, minus 1; infinite until a config works.

    near_after  how many trials it took to come within NEAR: quartiles over all seeds; None if it never did
    """

    strategy: str
    median: list[float]
    lower: list[float]
    upper: list[float]
    near_after: tuple[int | None, int | None, int | None]


def replay_searches(
    sweep: Sweep, strategies: Sequence[str], *, seeds: int, trials: int, workers: int | None = None
) -> list[Curve]:
    """Replay searches and return the curve of each strategy over `trials` trials.

    The searches run in `workers` processes, by default one per usable CPU.
    """
    searches = [(name, seed) for name in strategies for seed in range(seeds)]
    replay_search = partial(_replay_search, sweep, trials)
    if workers == 1:
        regrets_of_searches = list(map(replay_search, searches))
    else:
        with ProcessPoolExecutor(workers or usable_cpus(), mp_context=get_context("spawn")) as pool:
            regrets_of_searches = list(pool.map(replay_search, searches))
    by_strategy = {name: regrets_of_searches[i * seeds : (i + 1) * seeds] for i, name in enumerate(strategies)}
    return [_curve(name, regrets) for name, regrets in by_strategy.items()]


def regrets(sweep: Sweep, strategy: str, seed: int, trials: int) -> list[float]:
    """The regret after each trial of one replayed search, which sees only the costs of configs that it proposes."""
    if strategy not in STRATEGIES:
        raise ArgumentError("sampler", repr(strategy), ", ".join(STRATEGIES))
    place, shape, costs, best_us = sweep.place, sweep.shape, sweep.costs, sweep.best_us
    gpu = GPUS.get(place.gpu)
    if gpu is None:
        raise ArgumentError("gpu", repr(place.gpu), ", ".join(GPUS))
    search = Search(
        place.spec,
        gpu,
        first=[default_config(place.spec, shape, gpu)] if strategy == TUNER_STRATEGY else [],
        seed=seed,
        guess=lambda config: guess_us(place.spec, config, shape, gpu),
        sampler=None if strategy == TUNER_STRATEGY else strategy,
        among=costs,
    )
    regrets_so_far: list[float] = []
    best = float("inf")
    while len(regrets_so_far) < trials and (config := search.ask()) is not None:
        cost = costs[config]
        search.tell(config, cost)
        best = min(best, float("inf") if cost is None else cost)
        regrets_so_far.append(best / best_us - 1)
    return regrets_so_far


def _replay_search(sweep: Sweep, trials: int, search: tuple[str, int]) -> list[float]:
    strategy, seed = search
    return regrets(sweep, strategy, seed, trials)


def _curve(name: str, regrets_of_seeds: Iterable[list[float]]) -> Curve:
    regrets_of_seeds = list(regrets_of_seeds)
    quartiles = [_quartiles(regrets_of_trial) for regrets_of_trial in zip(*regrets_of_seeds, strict=True)]
    lower, median, upper = ([three[i] for three in quartiles] for i in range(3))
    never = float("inf")
    near = [next((n for n, regret in enumerate(r, start=1) if regret <= NEAR), never) for r in regrets_of_seeds]
    first, second, third = (None if n == never else round(n) for n in _quartiles(near))
    return Curve(name, median, lower, upper, (first, second, third))


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles that are values of the sample or midpoints of two, so that infinite values give no NaN."""
    ordered = sorted(values)
    half = len(ordered) // 2
    lower, upper = ordered[: half or 1], ordered[-(half or 1) :]
    return statistics.median_low(lower), statistics.median(ordered), statistics.median_high(upper)
