"""The requests to the tuner's killable children and their replies: pickled, so plain data without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from parallax_gen.memory.result import Outcome
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    from parallax_gen.codegen.resources import Resources

TRIAL_MS = 20.0  # how long a config is timed in its trial


@dataclass(frozen=True)
class KernelInstance:
    """One config of one spec, to be compiled for a GPU and run at a shape."""

    spec: KernelSpec
    config: KernelConfig
    shape: Shape
    gpu: Gpu


@dataclass(frozen=True)
class Compile:
    """Compile without touching a device."""

    instance: KernelInstance


@dataclass(frozen=True)
class Measure:
    """Check against the oracle, then time for about timed_ms, by `measure.time_call`."""

    instance: KernelInstance
    give_up_us: float = float("inf")
    timed_ms: float = TRIAL_MS
    in_bursts: bool = False


@dataclass(frozen=True)
class MeasureInterleaved:
    """Time instances of one spec and shape that passed their checks, interleaved: clock drift affects all equally."""

    instances: tuple[KernelInstance, ...]
    timed_ms: float = TRIAL_MS
    in_bursts: bool = False


@dataclass(frozen=True)
class Identify:
    """Identify the child's GPU; the reply is a Gpu, or None if CUDA finds none."""


@dataclass(frozen=True)
class Inspect:
    """Inspect the memory of the child's GPU; the reply is how many bytes others and its CUDA context take."""


@dataclass(frozen=True)
class Ready:
    """The first message of a child: it accepts requests. device: whether it has a device."""

    device: bool


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, and the 20th and 80th percentile over `replays` replays of a graph."""

    median_us: float
    p20_us: float
    p80_us: float
    calls_per_graph: int
    replays: int

    def per_launch(self, launches: int) -> Timing:
        """The mean timing of one launch, for a call that made `launches` launches."""
        median_us, p20_us, p80_us = (us / launches for us in (self.median_us, self.p20_us, self.p80_us))
        return replace(self, median_us=median_us, p20_us=p20_us, p80_us=p80_us)


@dataclass(frozen=True)
class Reply:
    """The reply to a request. No child reports the outcome PREDICTED.

    timings  for a MeasureInterleaved, one per instance
    """

    outcome: Outcome
    detail: str = ""
    resources: Resources | None = None
    timing: Timing | None = None
    error: float | None = None
    seconds: float = 0.0
    timings: tuple[Timing, ...] = ()


WorkerRequest = Compile | Measure | MeasureInterleaved
