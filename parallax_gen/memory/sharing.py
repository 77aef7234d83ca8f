"""What ranks send each other: as few records as let every call on a card choose as with all that is known.

The ranking weighs a record by the others of its search, and by what failed. So of each place are kept what a call may
look at, and what shows what those searches knew. Then every place is ranked by what is kept: where that is not as with
all, all that the place's rank rests on is kept. So there is one ranking, and nothing here needs to know its rules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from parallax_gen.memory.guard import looked_at
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Table, near_places, shown_by, sibling_places, siblings
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.problem.hardware import Gpu


def places_served(records: Iterable[Result], gpu: Gpu) -> list[Place]:
    """The places of a card at which a call may choose by any of these records; kernel by kernel."""
    known = dict.fromkeys(replace(record.place, gpu=gpu.name) for record in records)
    served = known | dict.fromkeys(near for place in known for near in near_places(place))
    return sorted(served, key=lambda place: place.order)


def records_shared(memory: Memory, gpu: Gpu) -> list[Result]:
    """So many of what is known that calls on a card look at the same kernels, in the same order, as with all."""
    everything = [r for name in (gpu.name, *siblings(gpu)) for r in memory.all(name) if r.counts]
    known = Table(everything)  # so that the memory is asked once, not at every place
    chosen = {place: list(looked_at(place, gpu, known)) for place in places_served(everything, gpu)}
    kept = {r for choice in chosen.values() for c in choice if c.record for r in shown_by(c.record, known)}
    while True:
        shared = [r for r in everything if r in kept]
        table = Table(shared)
        others = [place for place, choice in chosen.items() if list(looked_at(place, gpu, table)) != choice]
        if not others:
            return shared
        asked = (where for place in others for where in (place, *sibling_places(place, gpu), *near_places(place)))
        kept.update(r for where in dict.fromkeys(asked) for r in known.results(where))
