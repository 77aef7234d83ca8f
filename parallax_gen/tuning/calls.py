"""The tune of recorded calls: the kernels that take the most time, the costliest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from parallax_gen.errors import ArgumentError
from parallax_gen.memory.calls import Kernel
from parallax_gen.memory.guard import CheckedChoice, checked_choice
from parallax_gen.memory.place import Place, place_of
from parallax_gen.memory.ranking import RecordSource
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import representative
from parallax_gen.problem.steps import Call, Step
from parallax_gen.tuning.job import Job
from parallax_gen.tuning.plan import Plan
from parallax_gen.tuning.search.cost_model import guess_us

NEGLIGIBLE = 0.01  # of the time of all calls: the cheapest kernels, which together take less, are not tuned


@dataclass(frozen=True)
class CallsPlan(Plan):
    """The plan for recorded calls: one step, whose calls are those of the costliest kernels, the costliest first.

    shares  the share that each kernel's calls have in the time of all recorded calls
    """

    shares: Mapping[Place, float]

    @cached_property
    def jobs(self) -> list[Job]:
        return [Job(place.spec, place.bucket, self.gpu) for place in self.choices]


def plan_of_calls(counts: Mapping[Kernel, int], gpu: Gpu, memory: RecordSource) -> CallsPlan:
    """The plan for the calls of a recording on a card. Raises ArgumentError if there are none."""
    if not counts:
        raise ArgumentError("calls", "a recording of no calls", "one of calls on a CUDA device")
    places: Counter[Place] = Counter()
    for (spec, bucket), count in counts.items():
        places[place_of(gpu.name, spec, bucket)] += count
    choices = {place: checked_choice(place, gpu, memory) for place in places}
    costs = {place: count * time_now_us(place, choices[place], gpu) for place, count in places.items()}
    total = left = sum(costs.values())
    kept: list[Place] = []
    for place in sorted(costs, key=costs.__getitem__, reverse=True):
        if kept and left < NEGLIGIBLE * total:
            break
        kept.append(place)
        left -= costs[place]
    calls = tuple(Call(p.spec, representative(p.bucket, p.spec.group), places[p]) for p in kept)
    count, others = sum(counts.values()), len(costs) - len(kept)
    title = f"{count} recorded call{'s' * (count > 1)} of {len(costs)} kernel{'s' * (len(costs) > 1)}"
    rest = f"{others} others take" if others > 1 else "1 other takes"
    detail = f"{rest} less than 1 % of the time" if others else "all of them"
    step = Step("recorded calls", detail, calls)
    return CallsPlan(title, [step], gpu, {p: choices[p] for p in kept}, {p: costs[p] / total for p in kept})


def time_now_us(place: Place, choice: CheckedChoice, gpu: Gpu) -> float:
    """The time of one launch of the kernel that calls at a place get now.

    As it was measured in this bucket, here or where the config is borrowed from; else as the cost model predicts it.
    """
    record = choice.candidate.record
    if record is not None and record.place.bucket == place.bucket and record.time_us is not None:
        return record.time_us
    return guess_us(place.spec, choice.candidate.config, Job(place.spec, place.bucket, gpu).timed_shape, gpu)
