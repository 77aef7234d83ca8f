"""What there is to tune, where to begin, and how far it has come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar

from parallax_gen.codegen.render import render
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Tier, best, default_of, evidence_of, near_buckets, ranked, siblings
from parallax_gen.memory.result import PROTOCOL, Result
from parallax_gen.memory.shipped import Memory, load_shipped
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig, Layout, op_of
from parallax_gen.ops.space import timed_shape, why_invalid
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.shapes import Bucket, Shape, bucket_of, representative
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import NO_FLAGS, TRAINING, USUAL_HEAD_DIM, Flags, kernels, usual

_Which = TypeVar("_Which", KernelSpec, Bucket)


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


def proven_configs(job: Job, folder: Path | None = None) -> list[KernelConfig]:
    """What was fastest for the job's spec on GPUs of the same capability, of the records that ship.

    All that are known of its bucket, then the best of its kin there, then the best of each other bucket. Of any
    template and Triton: to begin with, not to believe.
    """
    alike = [gpu.name for gpu in GPUS.values() if gpu.capability == job.gpu.capability]
    shipped = [r for name in alike for r in load_shipped(name, folder)]
    records = [r for r in shipped if r.place.spec == job.spec]
    here = [r.config for r in records if r.place.bucket == job.bucket]
    # A file has each place's fastest first.
    of_kin = {
        r.place: r.config for r in reversed(shipped) if r.place.bucket == job.bucket and _kin(r.place.spec, job.spec)
    }
    best = {r.place.bucket: r.config for r in reversed(records)}
    return list(dict.fromkeys([*here, *of_kin.values(), *best.values()]))


HOW_KEPT = ("page_size", "cache_dtype", "leftpad", "stats")


def _kin(one: KernelSpec, other: KernelSpec) -> bool:
    """Whether two kernels of decode differ in no more than how a cache is kept, and what else is written."""
    names = [f.name for f in fields(KernelSpec) if f.name not in HOW_KEPT]
    return op_of(one).own_lengths and one != other and all(getattr(one, name) == getattr(other, name) for name in names)


def nearby_configs(job: Job, known: Iterable[Result]) -> list[KernelConfig]:
    """What was fastest where it was measured: of the job's kin in its bucket, of its spec in the two nearest others.

    Sizes are compared by ratio.
    """
    kin: dict[KernelSpec, Result] = {}
    best: dict[Bucket, Result] = {}
    for result in filter(lambda r: r.measured, known):
        here = result.place.bucket == job.bucket
        if here and _kin(result.place.spec, job.spec):
            _keep_faster(kin, result.place.spec, result)
        elif not here and result.place.spec == job.spec:
            _keep_faster(best, result.place.bucket, result)

    def distance(bucket: Bucket) -> float:
        sizes = zip(vars(bucket).values(), vars(job.bucket).values(), strict=True)
        return sum(abs(math.log2(max(one, 1) / max(other, 1))) for one, other in sizes)

    nearest = [best[bucket].config for bucket in sorted(best, key=distance)[:2]]
    return list(dict.fromkeys([*(result.config for result in kin.values()), *nearest]))


def _keep_faster(best: dict[_Which, Result], which: _Which, result: Result) -> None:
    other = best.get(which)
    if other is None or (result.time_us or 0.0) < (other.time_us or 0.0):
        best[which] = result


@dataclass
class Progress:
    """How a job stands. `kinds` counts this run's outcomes, `known` those that earlier runs left.

    elsewhere  how many configs other workers tried meanwhile, where the job is shared
    deadline   when its seconds are spent, on time.monotonic's clock; math.inf before they count
    """

    job: Job
    known: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
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
    return list(dict.fromkeys([best(place, gpu, memory).config, *found]))[:MOST_REFRESHED]


def _fastest(results: Iterable[Result], job: Job, count: int) -> Sequence[KernelConfig]:
    """Configs of the fastest that were measured and are valid today."""
    measured = sorted((r for r in results if r.measured), key=lambda r: r.time_us or 0.0)
    return [r.config for r in measured if why_invalid(job.spec, r.config, job.gpu) is None][:count]
