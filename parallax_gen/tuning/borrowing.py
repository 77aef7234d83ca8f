"""Evaluates the ranking: which configs would calls borrow if some records were missing, and how much slower are they?

The evaluation uses sets of comparable times: several configs of one place, timed with one toolchain and one protocol.
The slowdown of the config that a call there would get is its time divided by the fastest time of the set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import geometric_mean

from parallax_gen.errors import StoreError
from parallax_gen.memory.lines import is_database, read_file
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, Tier, best, default_of, siblings
from parallax_gen.memory.result import Result
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.spec import PER_SEQUENCE_LENGTHS_TEXT, KernelSpec
from parallax_gen.tuning.search.recorded_sweep import read_sweep
from parallax_gen.tuning.seeds import nearest_buckets

NEAREST = "the nearest bucket"  # its best record is evaluated for every op, also for ops that do not borrow it
CHOICES = (*(tier.text for tier in Tier if tier != Tier.DEFAULT), NEAREST, Tier.DEFAULT.text)  # best first


@dataclass(frozen=True)
class ComparableTimes:
    """Comparable times: microseconds of two or more configs of one place, toolchain and timing protocol."""

    place: Place
    toolchain: Toolchain
    protocol: int
    times: dict[KernelConfig, float] = field(compare=False)

    def slowdown(self, config: KernelConfig) -> float | None:
        """A config's time divided by the fastest; None if it was not measured."""
        return self.times[config] / min(self.times.values()) if config in self.times else None

    def matches(self, result: Result) -> bool:
        """Whether a record is of the same place, toolchain and protocol."""
        evidence = result.evidence
        return (result.place, _toolchain(result), evidence.protocol) == (self.place, self.toolchain, self.protocol)


@dataclass(frozen=True)
class Borrowed:
    """The config that a call at a place would get without some of the records.

    left_out  the records that are left out, such as "this card"
    choice    the evidence for the config: the text of its tier, or NEAREST
    """

    comparable: ComparableTimes
    left_out: str
    choice: str
    config: KernelConfig
    default: KernelConfig

    @property
    def slowdown(self) -> float | None:
        return self.comparable.slowdown(self.config)

    @property
    def default_slowdown(self) -> float | None:
        return self.comparable.slowdown(self.default)


@dataclass(frozen=True)
class Summary:
    """The slowdown of the choices of one kind, and the slowdown of the default at the same places.

    kind        the op; for decode also whether lengths are per sequence, whether sequences have several queries, and
                whether the cache is paged
    choice      one of CHOICES
    places      how many places have measurements of both the choice and the default; means and worst are over these
    unmeasured  how many places lack one of the two measurements
    mean        geometric mean of the slowdown; None without places
    """

    kind: str
    choice: str
    places: int
    unmeasured: int
    mean: float | None
    worst: float | None
    default_mean: float | None
    default_worst: float | None


def read_results(path: Path) -> list[Result]:
    """The results in a recorded sweep, in a file of records, or in a tuning database.

    Raises StoreError, naming file and line, on anything else.
    """
    if path.suffix == ".gz" or (not is_database(path) and _is_sweep(path)):
        return list(read_sweep(path).results)
    parsed = read_file(path)
    if parsed.problems:
        raise StoreError(parsed.problems[0])
    return parsed.results


def comparable_times(results: Iterable[Result]) -> list[ComparableTimes]:
    """The sets of comparable times in results, with the newest time of each config. Skips cards that are not in GPUS.

    Raises StoreError if no place has two configs of one toolchain.
    """
    groups: dict[tuple[Place, Toolchain, int], dict[KernelConfig, float]] = {}
    for result in sorted(results, key=lambda result: result.created):
        if result.outcome.timed and result.time_us and result.place.gpu in GPUS:
            key = result.place, _toolchain(result), result.evidence.protocol
            groups.setdefault(key, {})[result.config] = result.time_us
    sets = [ComparableTimes(*key, times) for key, times in groups.items() if len(times) > 1]
    if not sets:
        raise StoreError(
            "no times can be compared: that needs two or more configs of one place, timed with one toolchain"
        )
    return sets


def borrowed(comparable: ComparableTimes, records: Sequence[Result]) -> Iterator[Borrowed]:
    """The config that a call at a measured place gets, as more and more of the records are left out.

    Last comes the config of the nearest bucket, if there is one.
    """
    place, gpu = comparable.place, GPUS[comparable.place.gpu]
    cards = {gpu.name, *siblings(gpu)}
    same_kernel = [record for record in records if record.place.spec == place.spec and record.place.gpu in cards]
    default = default_of(place, gpu)
    left_out: dict[str, Callable[[Result], bool]] = {
        "nothing": lambda record: False,
        "this toolchain": comparable.matches,
        "this card": lambda record: record.place == place,
        "this bucket": lambda record: record.place.bucket == place.bucket,
    }
    remaining = same_kernel
    for name, is_left_out in left_out.items():
        remaining = [record for record in same_kernel if not is_left_out(record)]
        candidate = best(place, gpu, RecordTable(remaining), comparable.toolchain)
        yield Borrowed(comparable, name, candidate.tier.text, candidate.config, default)
    if config := _nearest(comparable, remaining):
        yield Borrowed(comparable, name, NEAREST, config, default)


def summarise(choices: Iterable[Borrowed]) -> list[Summary]:
    """One summary per kind of kernel and choice. A place counts once, with the fewest records left out."""
    groups: dict[tuple[str, int], dict[ComparableTimes, Borrowed]] = {}
    for borrowed_config in choices:
        key = kind_of(borrowed_config.comparable.place.spec), CHOICES.index(borrowed_config.choice)
        groups.setdefault(key, {}).setdefault(borrowed_config.comparable, borrowed_config)
    return [_summary(kind, CHOICES[i], list(groups[kind, i].values())) for kind, i in sorted(groups)]


def kind_of(spec: KernelSpec) -> str:
    """The op, and for decode the properties of its cache that determine its speed."""
    lengths = f", {PER_SEQUENCE_LENGTHS_TEXT}" if op_of(spec).per_sequence_lengths else ""
    flags = [text for text, is_set in (("prompts", spec.multi_token), ("paged", spec.page_size)) if is_set]
    return ", ".join([f"{spec.public_op}{lengths}", *flags])


def _summary(kind: str, choice: str, choices: list[Borrowed]) -> Summary:
    pairs = [(c.slowdown, c.default_slowdown) for c in choices]
    both = [(slowdown, default) for slowdown, default in pairs if slowdown is not None and default is not None]
    means: list[float | None] = [None] * 4
    if both:
        slowdowns, defaults = zip(*both, strict=True)
        means = [geometric_mean(slowdowns), max(slowdowns), geometric_mean(defaults), max(defaults)]
    return Summary(kind, choice, len(both), len(pairs) - len(both), *means)


def _nearest(comparable: ComparableTimes, records: Sequence[Result]) -> KernelConfig | None:
    """The config that a call gets in the nearest bucket with a usable record: nearest in kv_rows, then in lengths."""
    place, gpu, table = comparable.place, GPUS[comparable.place.gpu], RecordTable(records)
    buckets = dict.fromkeys(record.place.bucket for record in records)
    for bucket in nearest_buckets(place.bucket, buckets, kv_rows_first=True):
        candidate = best(replace(place, bucket=bucket), gpu, table, comparable.toolchain)
        if candidate.record is not None:
            return candidate.config
    return None


def _toolchain(result: Result) -> Toolchain:
    """The parts of the toolchain that decide whether two are comparable."""
    return Toolchain(minor(result.evidence.triton), result.evidence.cuda)


def _is_sweep(path: Path) -> bool:
    """Whether a file's first line is the header of a recorded sweep."""
    with suppress(OSError, ValueError, RecursionError), path.open("rb") as file:
        header = json.loads(file.readline())
        return isinstance(header, dict) and "columns" in header
    return False
