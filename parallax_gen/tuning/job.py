"""The jobs of a tune or a refresh, and their progress."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from parallax_gen.codegen.render import render
from parallax_gen.memory.place import Place, place_of
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
from parallax_gen.ops.base import KernelConfig, OpKind, op_of
from parallax_gen.ops.space import timed_shape
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Bucket, Shape, representative
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import work_of
from parallax_gen.problem.workloads import NO_FLAGS, STEP, TRAINING, USUAL_HEAD_DIM, Flags, kernels, usual_shapes


@dataclass(frozen=True)
class Job:
    """What to tune: one spec in one bucket on one GPU."""

    spec: KernelSpec
    bucket: Bucket
    gpu: Gpu

    @classmethod
    def of(cls, spec: KernelSpec, sizes: Shape | Bucket, gpu: Gpu) -> Job:
        """The job that tunes what calls of a kernel get at these sizes."""
        place = place_of(gpu.name, spec, sizes)
        return cls(place.spec, place.bucket, gpu)

    @property
    def place(self) -> Place:
        return Place(self.gpu.name, self.spec, self.bucket)

    @property
    def shape(self) -> Shape:
        """The shape that it is tuned at."""
        return representative(self.bucket, self.spec.group)

    @property
    def timed_shape(self) -> Shape:
        """A shape with the timed amount of work. With per-sequence lengths this is less than the work of `shape`."""
        return timed_shape(self.spec, self.shape)


def step_spec(spec: KernelSpec) -> KernelSpec:
    """One spec for all kernels of a training step that take the same inputs; any other spec unchanged."""
    return replace(spec, op="dqdr", stats=False) if op_of(spec).kind is OpKind.TILES else spec


def program_key(job: Job) -> str:
    """A text that must be equal for tuners to share a job: the kernel they render, the toolchain and the protocol."""
    kernel = evidence_of(render(job.spec, default_of(job.place, job.gpu), job.gpu)).kernel
    return f"{kernel}, {Toolchain.here()}, protocol {PROTOCOL}"


@dataclass
class Progress:
    """The progress of a job.

    known          how many results of earlier tunes there were
    outcomes       how many trials of this tune had each outcome
    other_tuners  how many configs other tuners tried meanwhile, if the job is shared
    deadline       when its time budget ends, on time.monotonic's clock; math.inf before the budget starts
    """

    job: Job
    known: int = 0
    outcomes: dict[Outcome, int] = field(default_factory=dict)
    best: Result | None = None
    seconds: float = 0.0
    other_tuners: int = 0
    deadline: float = math.inf

    @property
    def done(self) -> int:
        return sum(self.outcomes.values())


# -- The jobs of a tune.

# Inference, then training.
DEFAULT_OPS = ("forward", "decode", TRAINING)


def worklist(
    gpu: Gpu,
    *,
    ops: Sequence[str] = DEFAULT_OPS,
    head_dims: Sequence[int] = (),
    dtypes: Sequence[str] = ("bf16",),
    shapes: Mapping[str, Sequence[Shape]] | None = None,
    flags: Flags = NO_FLAGS,
) -> list[Job]:
    """One job per combination, op by op in the given order, without duplicates.

    ops        of OPS, or TRAINING for the four kernels of a training step
    head_dims  by default 128 with `shapes`, else the usual ones
    shapes     of each op, by default the usual ones; a shape's heads give the group of its jobs
    flags      each applies to the ops that have it
    """
    jobs: dict[Job, None] = {}  # a set that keeps the order
    for op in ops:
        if shapes is None:
            sizes = usual_shapes(op, tuple(head_dims))
        else:
            sizes = {head_dim: tuple(shapes[op]) for head_dim in head_dims or (USUAL_HEAD_DIM,)}
        for head_dim, op_shapes in sizes.items():
            for dtype in dtypes:
                for shape in op_shapes:
                    for spec, kernel_shape in kernels(op, head_dim, dtype, shape, flags):
                        jobs[Job.of(spec, kernel_shape, gpu)] = None
    return list(jobs)


def grid_jobs(
    gpu: Gpu,
    grid: Sequence[tuple[int, Shape]],
    head_dims: Sequence[int] = (),
    dtypes: Sequence[str] = ("bf16",),
    flags: Flags = NO_FLAGS,
) -> list[Job]:
    """The decode jobs of a grid, without duplicates; if head_dims is not empty, only its head_dims."""
    jobs: dict[Job, None] = {}
    for head_dim, shape in grid:
        for dtype in dtypes:
            if not head_dims or head_dim in head_dims:
                ((spec, kernel_shape),) = kernels("decode", head_dim, dtype, shape, flags)
                jobs[Job.of(spec, kernel_shape, gpu)] = None
    return list(jobs)


# -- The jobs of a refresh, which times known configs again: places with records, and a few configs for each place.

MAX_REFRESHED = 6  # configs per place
MAX_PER_TIER = 2  # more are useless: the fastest configs of a search differ by less than the timing's error
MAX_HINTS = 1  # configs whose measured kernel is no longer rendered


def refresh_jobs(memory: Memory, gpu: Gpu, is_wanted: Callable[[Place], bool] = lambda place: True) -> list[Job]:
    """Every place with a measurement on a card or its siblings, if its inputs fit the card's memory.

    Places with the weakest evidence come first, so that a refresh that is stopped early has gained the most. But the
    kernels of a training step stay together, because they are checked on the same inputs.
    """
    names = (gpu.name, *siblings(gpu))
    measured = (result.place for name in names for result in memory.all(name) if result.measured)
    places = dict.fromkeys(replace(place, gpu=gpu.name) for place in measured)
    wanted = (place for place in places if is_wanted(place) and _fits(place, gpu))
    return weakest_first({place: best(place, gpu, memory).tier for place in wanted}, gpu)


def weakest_first(tiers: Mapping[Place, Tier], gpu: Gpu) -> list[Job]:
    """A job for every place, those with the weakest evidence first; the kernels of a training step stay together."""
    steps: dict[tuple[KernelSpec, Bucket], list[Place]] = {}
    for place in tiers:
        steps.setdefault((step_spec(place.spec), place.bucket), []).append(place)
    order = sorted(steps.values(), key=lambda step: max(tiers[place] for place in step), reverse=True)
    return [Job(place.spec, place.bucket, gpu) for step in order for place in step]


def matches_filters(place: Place, *, ops: Sequence[str], head_dims: Sequence[int], dtypes: Sequence[str]) -> bool:
    """Whether a place matches the given filters; an empty filter matches everything."""
    spec = place.spec
    in_step = spec.public_op in STEP and (spec.stats or spec.public_op != "forward")
    return (
        (not ops or spec.public_op in ops or (TRAINING in ops and in_step))
        and (not head_dims or spec.head_dim in head_dims)
        and (not dtypes or spec.dtype in dtypes)
    )


def _fits(place: Place, gpu: Gpu) -> bool:
    """Whether a place's inputs fit the card's memory. A record from elsewhere may have any sizes."""
    unwindowed = replace(representative(place.bucket, place.spec.group), window=0)  # a window makes no tensor smaller
    return work_of(place.spec, unwindowed).bytes <= gpu.memory_bytes


def refresh_configs(job: Job, memory: Memory) -> list[KernelConfig]:
    """The configs that may be the fastest at a job's place, by all records.

    First the config that calls get now, so that a refresh that stops after it keeps it. Then today's default; a few
    configs of each tier of the ranking; the best of the nearest bucket; and the fastest among configs that are no
    longer rendered, or whose search did not know a knob.
    """
    place, gpu = job.place, job.gpu
    configs: dict[KernelConfig, None] = {default_of(place, gpu): None}
    tier_counts: Counter[Tier] = Counter()
    for candidate in ranked(place, gpu, memory):
        if candidate.config not in configs and tier_counts[candidate.tier] < MAX_PER_TIER:
            tier_counts[candidate.tier] += 1
            configs[candidate.config] = None
    configs |= dict.fromkeys(_fastest(memory.results(place), gpu, 1))
    for near in near_places(place, gpu):
        if nearest := _fastest(memory.results(near), gpu, 1):
            configs |= dict.fromkeys(nearest)
            break
    hints = (result for name in siblings(gpu) for result in memory.results(replace(place, gpu=name)))
    configs |= dict.fromkeys(_fastest(hints, gpu, MAX_HINTS))
    return list(dict.fromkeys([best(place, gpu, memory).config, *configs]))[:MAX_REFRESHED]


def _fastest(results: Iterable[Result], gpu: Gpu, count: int) -> list[KernelConfig]:
    """The configs of the fastest results that are valid today."""
    return [result.config for result in fastest(results) if is_valid(result, gpu)][:count]
