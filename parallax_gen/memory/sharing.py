"""The records that ranks of torch.distributed send each other: few, but enough to choose kernels as all records would.

The rank of a record depends on the other records of its search, and on failures. So for each place we keep the records
that a call may consider, and those that show which knobs their searches knew. Then we rank every place by the kept
records alone. Where the order differs from the order with all records, we keep every record that this place's ranking
reads. So there is one ranking, and this module does not depend on its rules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from parallax_gen.memory.guard import launch_candidates
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, places_read, representative_records, siblings
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.problem.hardware import Gpu


def places_served(records: Iterable[Result], gpu: Gpu) -> list[Place]:
    """The places of a card whose calls may get a config of these records, sorted by kernel."""
    return sorted({replace(record.place, gpu=gpu.name) for record in records}, key=lambda place: place.order)


def records_to_share(memory: Memory, gpu: Gpu) -> list[Result]:
    """The records with which calls on a card consider the same kernels, in the same order, as with all records."""
    informative = [r for name in (gpu.name, *siblings(gpu)) for r in memory.all(name) if r.informative]
    all_records = RecordTable(informative)  # one query of the memory instead of one per place
    chosen = {place: list(launch_candidates(place, gpu, all_records)) for place in places_served(informative, gpu)}
    kept = {
        r
        for choice in chosen.values()
        for c in choice
        if c.record
        for r in representative_records(c.record, all_records)
    }
    while True:
        shared = [r for r in informative if r in kept]
        table = RecordTable(shared)
        differing = [place for place, choice in chosen.items() if list(launch_candidates(place, gpu, table)) != choice]
        if not differing:
            return shared
        read_places = dict.fromkeys(read for place in differing for read in places_read(place, gpu))
        kept.update(r for place in read_places for r in all_records.results(place))
