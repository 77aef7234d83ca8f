"""What tuning gained over today's default, where one card timed both with one toolchain; and what ships without that.

A tuned result never loses to not tuning: the default of a place is timed beside its best, and ships with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Known, Table, best, default_of, is_rendered
from parallax_gen.memory.result import Evidence, Result
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.hardware import Gpu


def default_beside(record: Result, default: KernelConfig, gpu: Gpu, known: Known) -> Result | None:
    """The default's own record of a record's place, timed as that was, of today's kernel; None where there is none.

    default  today's default config of the call, at the record's place or at a sibling card's
    gpu      the record's card
    """
    timed = [
        result
        for result in known.results(record.place)
        if result.config == default and result.measured and timed_alike(result.evidence, record.evidence)
    ]
    timed.sort(key=lambda result: (_search(result.evidence) == _search(record.evidence), result.created), reverse=True)
    return next((result for result in timed if is_rendered(result, gpu)), None)


def gain(record: Result, default: Result | None) -> float | None:
    """The default's time over a record's: 1.1 where the default takes 10 % longer. None without the default's."""
    return default.time_us / record.time_us if default and default.time_us and record.time_us else None


def timed_alike(one: Evidence, other: Evidence) -> bool:
    """Whether times of one card may be compared: the same toolchain, as far as programs go, and the same protocol."""
    same = one.toolchain == other.toolchain or one.toolchain.like(other.toolchain)
    return same and one.protocol == other.protocol


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


def _search(evidence: Evidence) -> tuple[str, str, int]:
    return evidence.triton, evidence.cuda, evidence.protocol
