"""What tuning gained over today's default, where one card timed both with one toolchain; and what ships without that.

A tuned result never loses to not tuning: the default of a place is timed beside its best, and ships with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Table, best, default_beside, default_of, is_rendered, timed_alike
from parallax_gen.memory.result import Result
from parallax_gen.problem.hardware import Gpu


def gain(record: Result, default: Result | None) -> float | None:
    """The default's time over a record's: 1.1 where the default takes 10 % longer. None without the default's."""
    return default.time_us / record.time_us if default and default.time_us and record.time_us else None


@dataclass(frozen=True)
class Standing:
    """What is chosen at a place of all that one toolchain measured of today's kernels, and today's default beside it.

    chosen   as the ranking has it
    default  the record of the default; None where the toolchain has not timed it
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


def standings(place: Place, gpu: Gpu, results: Iterable[Result]) -> list[Standing]:
    """One for each toolchain that measured a kernel which today's templates render. results: those of the place."""
    groups: list[list[Result]] = []
    for result in results:
        if result.measured and is_rendered(result, gpu):
            alike = (group for group in groups if timed_alike(group[0].evidence, result.evidence))
            group = next(alike, None)
            groups.append([result]) if group is None else group.append(result)
    default = default_of(place, gpu)
    found = []
    for group in groups:
        table = Table(group)
        chosen = best(place, gpu, table).record or group[0]  # passed over for the default, which was not timed
        found.append(Standing(place, chosen, default_beside(chosen, default, gpu, table)))
    return found


def standings_of(results: Iterable[Result], gpu: Gpu) -> list[Standing]:
    """Those of all places of a card. results: sorted by place, as what ships is."""
    places = groupby(results, key=lambda result: result.place)
    return [standing for place, group in places for standing in standings(place, gpu, group)]
