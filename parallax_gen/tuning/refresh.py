"""What is worth timing again where something is known already: places, and of each of them a few configs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Tier, best, default_of, near_buckets, ranked, siblings
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.problem.config import KernelConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.space import why_invalid
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.job import Job, step_of

MOST = 6  # configs of a place
OF_A_TIER = 2  # at most so many rest on evidence alike: the fastest two of a search differ by less than a timing
HINTS = 1  # of kernels that are not rendered any more


def known_jobs(memory: Memory, gpu: Gpu, wanted: Callable[[Place], bool] = lambda place: True) -> list[Job]:
    """Every place that anything was measured at, on a card or on one like it.

    Calls that rest on the least come first, so that a refresh that is stopped has done the most; but the kernels of
    a training step stay together, as they are checked on the same inputs.
    """
    names = (gpu.name, *siblings(gpu))
    measured = (result.place for name in names for result in memory.all(name) if result.measured)
    places = dict.fromkeys(replace(place, gpu=gpu.name) for place in measured)
    chosen = {place: best(place, gpu, memory) for place in places if wanted(place)}
    together: dict[tuple[KernelSpec, Bucket], list[Place]] = {}
    for place in chosen:
        together.setdefault((step_of(place.spec), place.bucket), []).append(place)
    order = sorted(together.values(), key=lambda of_step: max(chosen[place].tier for place in of_step), reverse=True)
    return [Job(place.spec, place.bucket, gpu) for of_step in order for place in of_step]


def known_configs(job: Job, memory: Memory) -> list[KernelConfig]:
    """Of a job's place what may be fastest by all that is known.

    First what calls get now: a refresh that is stopped there leaves them that. Then today's default; of each tier of
    the ranking a few; the best of the nearest bucket; and of what is not rendered any more, or was found by a search
    that did not know a knob, the fastest.
    """
    place, gpu = job.place, job.gpu
    found: dict[KernelConfig, None] = {default_of(place, gpu): None}
    taken: Counter[Tier] = Counter()
    for candidate in ranked(place, gpu, memory):
        if candidate.config not in found and taken[candidate.tier] < OF_A_TIER:
            taken[candidate.tier] += 1
            found[candidate.config] = None
    found |= dict.fromkeys(_fastest(memory.results(place), job, 1))
    for near in near_buckets(place):
        if there := _fastest(memory.results(near), job, 1):
            found |= dict.fromkeys(there)
            break
    hints = (result for name in siblings(gpu) for result in memory.results(replace(place, gpu=name)))
    found |= dict.fromkeys(_fastest(hints, job, HINTS))
    return list(dict.fromkeys([best(place, gpu, memory).config, *found]))[:MOST]


def _fastest(results: Iterable[Result], job: Job, count: int) -> Sequence[KernelConfig]:
    """Configs of the fastest that were measured and are valid today."""
    measured = sorted((r for r in results if r.measured), key=lambda r: r.time_us or 0.0)
    return [r.config for r in measured if why_invalid(job.spec, r.config, job.gpu) is None][:count]
