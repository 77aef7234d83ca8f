"""The speedup of tuned kernels over today's default, where one card timed both with one toolchain.

Tuning never makes a call slower: the default of a place is timed together with its best config, and ships with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, best, comparable, comparable_default, default_of, is_rendered
from parallax_gen.memory.result import Result
from parallax_gen.problem.hardware import Gpu


def gain(record: Result, default: Result | None) -> float | None:
    """The default's time divided by a record's: 1.1 if the default takes 10 % longer. None if a time is missing."""
    return default.time_us / record.time_us if default and default.time_us and record.time_us else None


@dataclass(frozen=True)
class Comparison:
    """Today's default at a place, and the config that the ranking chooses among one toolchain's measurements.

    chosen   the best record by the ranking
    default  the record of the default; None if the toolchain did not time it
    """

    place: Place
    chosen: Result
    default: Result | None

    @property
    def gain(self) -> float | None:
        return gain(self.chosen, self.default)

    @property
    def is_slower_than_default(self) -> bool:
        """Whether the chosen config is slower than the default."""
        return self.gain is not None and self.gain < 1


def comparisons(place: Place, gpu: Gpu, results: Iterable[Result]) -> list[Comparison]:
    """One comparison for each toolchain that measured a kernel of today's templates. results: the place's."""
    groups: list[list[Result]] = []
    for result in results:
        if result.measured and is_rendered(result, gpu):
            group = next((g for g in groups if comparable(g[0].evidence, result.evidence)), None)
            groups.append([result]) if group is None else group.append(result)
    default = default_of(place, gpu)
    pairs = []
    for group in groups:
        table = RecordTable(group)
        # The ranking may choose the default though it was not timed.
        chosen = best(place, gpu, table).record or group[0]
        pairs.append(Comparison(place, chosen, comparable_default(chosen, default, gpu, table)))
    return pairs


def comparisons_of(results: Iterable[Result], gpu: Gpu) -> list[Comparison]:
    """The comparisons of all places of a card. results: sorted by place, as shipped records are."""
    places = groupby(results, key=lambda result: result.place)
    return [comparison for place, group in places for comparison in comparisons(place, gpu, group)]
