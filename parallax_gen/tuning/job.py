"""What there is to tune, where to begin, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar

from parallax_gen.codegen.render import render
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import default_of, evidence_of
from parallax_gen.memory.result import PROTOCOL, Result
from parallax_gen.memory.shipped import load_shipped
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.problem.config import TILED, KernelConfig
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.shapes import Bucket, Shape, representative, timed_shape
from parallax_gen.problem.spec import KernelSpec

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
    return replace(spec, op="dqdr", stats=False) if spec.op in TILED else spec


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
    return one.op == "decode" and one != other and all(getattr(one, name) == getattr(other, name) for name in names)


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
