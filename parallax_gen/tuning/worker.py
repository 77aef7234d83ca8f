"""The parent's side of a killable child that compiles, checks and times: whatever a kernel does, the tuner lives.

Requests go pickled to the standard input of `tuning/child.py`, replies come pickled from its standard output.
Both ends are this program; nothing else is ever unpickled. The parent itself never touches CUDA.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from parallax_gen.errors import MeasureError
from parallax_gen.problem.config import KernelConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    from parallax_gen.codegen.resources import Resources

DIES_S = 30.0  # how long a killed child may take to be gone: a driver tears its context down first
TRIAL_MS = 20.0  # that a config is timed for at first
WAKES_S = 120.0  # how long a child may take to say which GPU it has: imports, on a busy machine


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
class Outcome:
    """What came of a request. kind is "ok" or a failure's: invalid, compile, resources, timeout, crash, wrong, slow.

    timings  of a Rematch, one a trial
    """

    kind: str
    detail: str = ""
    resources: Resources | None = None
    timing: Timing | None = None
    error: float | None = None
    seconds: float = 0.0
    timings: tuple[Timing, ...] = ()


Request = Compile | Measure | Rematch


class Worker:
    """The parent's handle on a child. Started when first asked, and again after it died.

    device  the index of the one GPU that the child sees, of those that this process may use; None for none
    """

    def __init__(self, *, device: int | None):
        self._device = device
        self._child: subprocess.Popen[bytes] | None = None
        self._log: Any = None

    def start(self) -> None:
        """Start the child ahead of the first request: importing torch takes seconds."""
        self._running()

    def ask(self, request: Request, timeout_s: float) -> Outcome:
        """The outcome of a request; "timeout" (the child is killed) or "crash" where none came back."""
        start = time.monotonic()
        try:
            outcome = self._ask(request, timeout_s)
        except TimeoutError:
            return Outcome("timeout", f"no answer in {timeout_s:.0f} s", seconds=time.monotonic() - start)
        except ChildProcessError as error:
            return Outcome("crash", str(error), seconds=time.monotonic() - start)
        assert isinstance(outcome, Outcome)
        return outcome

    def identify(self) -> Gpu | None:
        """The GPU that the child sees, None for none. Raises MeasureError where the child does not say."""
        try:
            gpu = self._ask(Identify(), WAKES_S)
        except (TimeoutError, ChildProcessError) as error:
            raise MeasureError(f"device {self._device} cannot be used: {error or 'no answer'}") from error
        assert gpu is None or isinstance(gpu, Gpu)
        return gpu

    def kill(self) -> None:
        """Kill the child, from any thread: one that waits in `ask` gets "crash"."""
        child = self._child
        if child is not None:
            _kill_group(child)

    def close(self) -> None:
        """Kill the child and let go of its pipes."""
        if self._child is not None:
            _kill_group(self._child)
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: nothing more can be done
                self._child.wait(DIES_S)
            for pipe in (self._child.stdin, self._child.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # of a request it never read
                    pipe.close()
            self._log.close()
            self._child = None

    def _ask(self, request: object, timeout_s: float) -> object:
        """The child's reply. Raises TimeoutError, or ChildProcessError with its last words; the child is gone then."""
        child = self._running()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            pickle.dump(request, child.stdin)
            child.stdin.flush()
            ready, _, _ = select.select([child.stdout], [], [], timeout_s)
            if ready:
                return pickle.load(child.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            words = self._last_words()
            self.close()
            raise ChildProcessError(words) from error
        self.close()
        raise TimeoutError

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
            self._child = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "parallax_gen.tuning.child",
                    *(["--device"] if self._device is not None else []),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C is for the parent; and what the child starts dies with it
            )
        return self._child

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if self._device is None:
            return environment | {"CUDA_VISIBLE_DEVICES": ""}
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return environment | {"CUDA_VISIBLE_DEVICES": str(self._device)}
        names = [name.strip() for name in visible.split(",") if name.strip()]
        return environment | {"CUDA_VISIBLE_DEVICES": names[self._device] if self._device < len(names) else ""}

    def _last_words(self) -> str:
        assert self._child is not None
        try:
            self._child.wait(DIES_S)
        except subprocess.TimeoutExpired:
            return "it closed its pipes and does not end"
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"exit status {self._child.returncode}: {lines[-1].strip() if lines else 'no message'}"


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and all that it started, such as a ptxas that hangs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
