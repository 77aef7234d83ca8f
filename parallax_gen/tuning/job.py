"""What there is to tune, or to time again, and how far it has come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from parallax_gen.codegen.render import render
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import (
    Tier,
    best,
    default_of,
    evidence_of,
    fastest,
    is_valid,
    near_places,
    ranked,
    siblings,
)
from parallax_gen.memory.result import PROTOCOL, Outcome, Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig, Layout, op_of
from parallax_gen.ops.space import timed_shape
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Bucket, Shape, bucket_of, representative
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import work_of
from parallax_gen.problem.workloads import NO_FLAGS, TRAINING, USUAL_HEAD_DIM, Flags, kernels, usual


@dataclass(frozen=True)
class Job:
    """What to tune: one spec in one bucket on one GPU."""

    spec: KernelSpec
    bucket: Bucket
    gpu: Gpu

    @property
    def place(self) -> Place:
        return Place(self.gpu.name, self.spec, self.bucket)

    @property
    def shape(self) -> Shape:
        """The sizes it is tuned at."""
        return representative(self.bucket, self.spec.group)

    @property
    def timed_shape(self) -> Shape:
        """As much work as what is timed: where sequences have their own lengths, most are shorter than the shape's."""
        return timed_shape(self.spec, self.shape)


def step_of(spec: KernelSpec) -> KernelSpec:
    """What the kernels of a training step have in common that take the same inputs; any other spec as it is."""
    return replace(spec, op="dqdr", stats=False) if op_of(spec).layout is Layout.TILES else spec


def program_of(job: Job) -> str:
    """What workers that share a job must have in common: the kernels that they render, and what compiles them."""
    kernel = evidence_of(render(job.spec, default_of(job.place, job.gpu), job.gpu)).kernel
    return f"{kernel}, {Toolchain.here()}, protocol {PROTOCOL}"


@dataclass
class Progress:
    """How a job stands. `kinds` counts this run's outcomes, `known` those that earlier runs left.

    elsewhere  how many configs other workers tried meanwhile, where the job is shared
    deadline   when its seconds are spent, on time.monotonic's clock; math.inf before they count
    """

    job: Job
    known: int = 0
    kinds: dict[Outcome, int] = field(default_factory=dict)
    best: Result | None = None
    seconds: float = 0.0
    elsewhere: int = 0
    deadline: float = math.inf

    @property
    def done(self) -> int:
        return sum(self.kinds.values())


# -- The jobs that a tune has to do.

# Everything: inference, then training.
ALL_WORK = ("forward", "decode", TRAINING)


def worklist(
    gpu: Gpu,
    *,
    ops: Sequence[str] = ALL_WORK,
    head_dims: Sequence[int] = (),
    dtypes: Sequence[str] = ("bf16",),
    shapes: Mapping[str, Sequence[Shape]] | None = None,
    flags: Flags = NO_FLAGS,
) -> list[Job]:
    """Every combination as a job, op by op in the order given; those of the same key once.

    ops        of OPS, or TRAINING for the four kernels of a training step
    head_dims  by default 128 of the shapes given, else the usual ones
    shapes     an op's, by default the usual ones; each one's heads are its jobs' group
    flags      each goes to the ops that have it
    """
    jobs: dict[Job, None] = {}  # a set that keeps the order
    for op in ops:
        if shapes is None:
            sizes = usual(op, tuple(head_dims))
        else:
            sizes = {head_dim: tuple(shapes[op]) for head_dim in head_dims or (USUAL_HEAD_DIM,)}
        for head_dim, its_shapes in sizes.items():
            for dtype in dtypes:
                for shape in its_shapes:
                    for spec, seen in kernels(op, head_dim, dtype, shape, flags):
                        jobs[Job(spec, bucket_of(seen), gpu)] = None
    return list(jobs)


def of_grid(
    gpu: Gpu,
    grid: Sequence[tuple[int, Shape]],
    head_dims: Sequence[int] = (),
    dtypes: Sequence[str] = ("bf16",),
    flags: Flags = NO_FLAGS,
) -> list[Job]:
    """A grid's decode jobs, those of the same key once; of some of its head_dims, if given."""
    jobs: dict[Job, None] = {}
    for head_dim, shape in grid:
        for dtype in dtypes:
            if not head_dims or head_dim in head_dims:
                ((spec, seen),) = kernels("decode", head_dim, dtype, shape, flags)
                jobs[Job(spec, bucket_of(seen), gpu)] = None
    return list(jobs)


# -- What is worth timing again where something is known already: places, and of each of them a few configs.

MOST_REFRESHED = 6  # configs of a place
OF_A_TIER = 2  # at most so many rest on evidence alike: the fastest two of a search differ by less than a timing
HINTS = 1  # of kernels that are not rendered any more


def known_jobs(memory: Memory, gpu: Gpu, wanted: Callable[[Place], bool] = lambda place: True) -> list[Job]:
    """Every place that anything was measured at, on a card or on one like it, and whose inputs the card can hold.

    Calls that rest on the least come first, so that a refresh that is stopped has done the most; but the kernels of
    a training step stay together, as they are checked on the same inputs.
    """
    names = (gpu.name, *siblings(gpu))
    measured = (result.place for name in names for result in memory.all(name) if result.measured)
    places = dict.fromkeys(replace(place, gpu=gpu.name) for place in measured)
    chosen = {place: best(place, gpu, memory) for place in places if wanted(place) and _fits(place, gpu)}
    together: dict[tuple[KernelSpec, Bucket], list[Place]] = {}
    for place in chosen:
        together.setdefault((step_of(place.spec), place.bucket), []).append(place)
    order = sorted(together.values(), key=lambda of_step: max(chosen[place].tier for place in of_step), reverse=True)
    return [Job(place.spec, place.bucket, gpu) for of_step in order for place in of_step]


def _fits(place: Place, gpu: Gpu) -> bool:
    """A record from elsewhere may be of sizes that nobody has memory for."""
    whole = replace(representative(place.bucket, place.spec.group), window=0)  # a window reads less of as much
    return work_of(place.spec, whole).bytes <= gpu.memory_bytes


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
    found |= dict.fromkeys(_fastest(memory.results(place), gpu, 1))
    for near in near_places(place):
        if there := _fastest(memory.results(near), gpu, 1):
            found |= dict.fromkeys(there)
            break
    hints = (result for name in siblings(gpu) for result in memory.results(replace(place, gpu=name)))
    found |= dict.fromkeys(_fastest(hints, gpu, HINTS))
    return list(dict.fromkeys([best(place, gpu, memory).config, *found]))[:MOST_REFRESHED]


def _fastest(results: Iterable[Result], gpu: Gpu, count: int) -> list[KernelConfig]:
    """Configs of the fastest that are valid today."""
    return [result.config for result in fastest(results) if is_valid(result, gpu)][:count]
