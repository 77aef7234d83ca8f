"""What calls would borrow where a part of the memory were not there, and what they would lose: the ranking, judged.

The judge is a set of measurements: of one place, several configs that one toolchain timed by one protocol. The ranking
is asked what a call there would get; what that took, over the fastest of the set, is the loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import geometric_mean

from parallax_gen.errors import ArgumentError, StoreError
from parallax_gen.memory.lines import is_database, read_file
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, Tier, best, default_of, nearest_buckets, siblings
from parallax_gen.memory.result import Result
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.search.recorded_sweep import read_sweep

NEAREST = "the nearest bucket"  # whose best record is judged for every op, whether or not the ranking has that tier
CHOICES = (*(tier.words for tier in Tier if tier != Tier.DEFAULT), NEAREST, Tier.DEFAULT.words)  # the best first


@dataclass(frozen=True)
class Measured:
    """Times that can be compared: microseconds of two configs or more, of one place, toolchain and timing protocol."""

    place: Place
    toolchain: Toolchain
    protocol: int
    times: dict[KernelConfig, float] = field(compare=False)

    def loss(self, config: KernelConfig) -> float | None:
        """What a config took, over the fastest; None where it was not measured."""
        return self.times[config] / min(self.times.values()) if config in self.times else None

    def holds(self, result: Result) -> bool:
        """Whether a record is of the same place, toolchain and protocol."""
        evidence = result.evidence
        return (result.place, _toolchain(result), evidence.protocol) == (self.place, self.toolchain, self.protocol)


@dataclass(frozen=True)
class Borrowed:
    """What a call would get at a place of which something is left out.

    left_out  of the memory, such as "this card"
    choice    what the config rests on: the words of its tier, or NEAREST
    """

    measured: Measured
    left_out: str
    choice: str
    config: KernelConfig
    default: KernelConfig

    @property
    def loss(self) -> float | None:
        return self.measured.loss(self.config)

    @property
    def default_loss(self) -> float | None:
        return self.measured.loss(self.default)


@dataclass(frozen=True)
class Summary:
    """What choices of one kind lose, and what the default does at the same places.

    kind        the op; of decode also whether sequences have their own lengths, and pages
    choice      one of CHOICES
    places      those where the choice and the default were measured: means and the worst are of them
    unmeasured  those where one of the two was not
    mean        geometric; None where there are no places
    """

    kind: str
    choice: str
    places: int
    unmeasured: int
    mean: float | None
    worst: float | None
    default_mean: float | None
    default_worst: float | None


def read_measured(path: Path) -> list[Result]:
    """The results in a recorded sweep, in a file of records, or in a tuning database.

    Raises StoreError, naming file and line, on anything else.
    """
    if path.suffix == ".gz" or (not is_database(path) and _is_sweep(path)):
        return list(read_sweep(path).results)
    found = read_file(path)
    if found.problems:
        raise StoreError(found.problems[0])
    return found.results


def measured_together(results: Iterable[Result]) -> list[Measured]:
    """The sets of comparable times in results: of each config the newest. Cards must be in the table of GPUs.

    Raises ArgumentError where no place has two configs of one toolchain.
    """
    together: dict[tuple[Place, Toolchain, int], dict[KernelConfig, float]] = {}
    for result in sorted(results, key=lambda result: result.created):
        if result.outcome.timed and result.time_us and result.place.gpu in GPUS:
            of_place = result.place, _toolchain(result), result.evidence.protocol
            together.setdefault(of_place, {})[result.config] = result.time_us
    found = [Measured(*of_place, times) for of_place, times in together.items() if len(times) > 1]
    if not found:
        raise ArgumentError("results", "none that can be compared", "two configs of a place, by one toolchain")
    return found


def borrowed(measured: Measured, records: Sequence[Result]) -> Iterator[Borrowed]:
    """What a call at a measured place gets of records, as more and more of them is left out.

    At the end the config of the nearest bucket, where any is known.
    """
    place, gpu = measured.place, GPUS[measured.place.gpu]
    cards = {gpu.name, *siblings(gpu)}
    alike = [record for record in records if record.place.spec == place.spec and record.place.gpu in cards]
    default = default_of(place, gpu)
    left_out: dict[str, Callable[[Result], bool]] = {
        "nothing": lambda record: False,
        "this toolchain": measured.holds,
        "this card": lambda record: record.place == place,
        "this bucket": lambda record: record.place.bucket == place.bucket,
    }
    rest = alike
    for name, is_out in left_out.items():
        rest = [record for record in alike if not is_out(record)]
        candidate = best(place, gpu, RecordTable(rest), measured.toolchain)
        yield Borrowed(measured, name, candidate.tier.words, candidate.config, default)
    if config := _nearest(measured, rest):
        yield Borrowed(measured, name, NEAREST, config, default)


def summarise(choices: Iterable[Borrowed]) -> list[Summary]:
    """A line a kind of kernel and of choice: at each place the first of its kind, with as little as can be left out."""
    alike: dict[tuple[str, int], dict[Measured, Borrowed]] = {}
    for each in choices:
        kind = kind_of(each.measured.place.spec), CHOICES.index(each.choice)
        alike.setdefault(kind, {}).setdefault(each.measured, each)
    return [_summary(kind, CHOICES[at], list(alike[kind, at].values())) for kind, at in sorted(alike)]


def kind_of(spec: KernelSpec) -> str:
    """The op, and of decode what about its cache decides its speed."""
    return f"{spec.family}{', ragged' if op_of(spec).own_lengths else ''}{', paged' if spec.page_size else ''}"


def _summary(kind: str, choice: str, choices: list[Borrowed]) -> Summary:
    pairs = [(c.loss, c.default_loss) for c in choices]
    both = [(loss, default) for loss, default in pairs if loss is not None and default is not None]
    means: list[float | None] = [None] * 4
    if both:
        losses, defaults = zip(*both, strict=True)
        means = [geometric_mean(losses), max(losses), geometric_mean(defaults), max(defaults)]
    return Summary(kind, choice, len(both), len(pairs) - len(both), *means)


def _nearest(measured: Measured, records: Sequence[Result]) -> KernelConfig | None:
    """What a call in the nearest bucket with a usable record gets: along keys before rows."""
    place, gpu, known = measured.place, GPUS[measured.place.gpu], RecordTable(records)

    buckets = dict.fromkeys(record.place.bucket for record in records)
    for bucket in nearest_buckets(place.bucket, buckets, rows_first=True):
        candidate = best(replace(place, bucket=bucket), gpu, known, measured.toolchain)
        if candidate.record is not None:
            return candidate.config
    return None


def _toolchain(result: Result) -> Toolchain:
    """By what decides whether two are alike."""
    return Toolchain(minor(result.evidence.triton), result.evidence.cuda)


def _is_sweep(path: Path) -> bool:
    """Whether the first line of a file is that of a recorded sweep."""
    with suppress(OSError, ValueError, RecursionError), path.open("rb") as file:
        header = json.loads(file.readline())
        return isinstance(header, dict) and "columns" in header
    return False
