"""What a tuner asks of its killable children, and what they answer: pickled, so plain data without torch."""

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

TRIAL_MS = 20.0  # that a config is timed for at first


@dataclass(frozen=True)
class Trial:
    """One config of one spec, to be compiled for a GPU and run at a shape."""

    spec: KernelSpec
    config: KernelConfig
    shape: Shape
    gpu: Gpu


@dataclass(frozen=True)
class Compile:
    """Compile without touching a device."""

    trial: Trial


@dataclass(frozen=True)
class Measure:
    """Check against the oracle, then time for about timed_ms; a call slower than give_up_us for less."""

    trial: Trial
    give_up_us: float = float("inf")
    timed_ms: float = TRIAL_MS
    from_rest: bool = False


@dataclass(frozen=True)
class Rematch:
    """Time trials that passed already, of one spec and shape, in turns: what drifts meanwhile drifts for all."""

    trials: tuple[Trial, ...]
    timed_ms: float = TRIAL_MS
    from_rest: bool = False


@dataclass(frozen=True)
class Identify:
    """Say which GPU the child has; answered with a Gpu, or None where CUDA finds none."""


@dataclass(frozen=True)
class Ready:
    """What a child says first, once it may be asked. device: whether it has one."""

    device: bool


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, and the 20th and 80th percentile over `replays` replays of a graph."""

    median_us: float
    p20_us: float
    p80_us: float
    calls_a_graph: int
    replays: int

    def a_part(self, parts: int) -> Timing:
        """Of a call that was so many launches: of one of them, on the average."""
        return replace(self, median_us=self.median_us / parts, p20_us=self.p20_us / parts, p80_us=self.p80_us / parts)


@dataclass(frozen=True)
class TrialResult:
    """What came of a request: any outcome but PREDICTED, which no child is asked for.

    timings  of a Rematch, one a trial
    """

    outcome: Outcome
    detail: str = ""
    resources: Resources | None = None
    timing: Timing | None = None
    error: float | None = None
    seconds: float = 0.0
    timings: tuple[Timing, ...] = ()


Request = Compile | Measure | Rematch
