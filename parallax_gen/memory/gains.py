"""What tuning gained over today's default, where one card timed both with one toolchain.

A tuned result never loses to not tuning: the default of a place is timed beside its best, and ships with it.
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
    """The default's time divided by a record's: 1.1 if the default takes 10 % longer. None without both times."""
    return default.time_us / record.time_us if default and default.time_us and record.time_us else None


@dataclass(frozen=True)
class Comparison:
    """The ranking's choice at a place among one toolchain's measurements of today's kernels, and today's default.

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
    def slower(self) -> bool:
        """Whether not tuning would be faster."""
        return self.gain is not None and self.gain < 1


def comparisons(place: Place, gpu: Gpu, results: Iterable[Result]) -> list[Comparison]:
    """One comparison for each toolchain that measured a kernel of today's templates. results: the place's."""
    groups: list[list[Result]] = []
    for result in results:
        if result.measured and is_rendered(result, gpu):
            alike = (group for group in groups if comparable(group[0].evidence, result.evidence))
            group = next(alike, None)
            groups.append([result]) if group is None else group.append(result)
    default = default_of(place, gpu)
    pairs = []
    for group in groups:
        table = RecordTable(group)
        chosen = best(place, gpu, table).record or group[0]  # the ranking chose the default, which was not timed
        pairs.append(Comparison(place, chosen, comparable_default(chosen, default, gpu, table)))
    return pairs


def comparisons_of(results: Iterable[Result], gpu: Gpu) -> list[Comparison]:
    """The comparisons of all places of a card. results: sorted by place, as shipped records are."""
    places = groupby(results, key=lambda result: result.place)
    return [comparison for place, group in places for comparison in comparisons(place, gpu, group)]
