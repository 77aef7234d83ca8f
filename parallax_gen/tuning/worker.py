"""The parent's side of a killable child that compiles, checks and times: whatever a kernel does, the tuner lives.

Requests go pickled to the standard input of `tuning/child.py`, outcomes come pickled from its standard output.
Both ends are this program; nothing else is ever unpickled.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parallax_gen.problem.config import KernelConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    from parallax_gen.codegen.resources import Resources
    from parallax_gen.tuning.measure import Timing


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
    timed_ms: float = 40.0
    from_rest: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a request. kind is "ok" or a failure's: invalid, compile, resources, timeout, crash, wrong, slow."""

    kind: str
    detail: str = ""
    resources: Resources | None = None
    timing: Timing | None = None
    error: float | None = None
    seconds: float = 0.0


class Worker:
    """The parent's handle on a child. Started when first asked, and again after it died."""

    def __init__(self, *, with_device: bool):
        self._with_device = with_device
        self._child: subprocess.Popen[bytes] | None = None
        self._log: Any = None

    def start(self) -> None:
        """Start the child ahead of the first request: importing torch takes seconds."""
        self._running()

    def ask(self, request: Compile | Measure, timeout_s: float) -> Outcome:
        """The outcome of a request; "timeout" (the child is killed) or "crash" where none came back."""
        start = time.monotonic()
        child = self._running()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            pickle.dump(request, child.stdin)
            child.stdin.flush()
            ready, _, _ = select.select([child.stdout], [], [], timeout_s)
            if ready:
                outcome = pickle.load(child.stdout)
                assert isinstance(outcome, Outcome)
                return outcome
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            detail = self._last_words()
            self.close()
            return Outcome("crash", detail, seconds=time.monotonic() - start)
        self.close()
        return Outcome("timeout", f"no answer in {timeout_s:.0f} s", seconds=time.monotonic() - start)

    def kill(self) -> None:
        """Kill the child, from any thread: one that waits in `ask` gets "crash"."""
        child = self._child
        if child is not None:
            child.kill()

    def close(self) -> None:
        """Kill the child and let go of its pipes."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # of a request it never read
                    pipe.close()
            self._log.close()
            self._child = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            if not self._with_device:
                environment["CUDA_VISIBLE_DEVICES"] = ""
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
            self._child = subprocess.Popen(
                [sys.executable, "-m", "parallax_gen.tuning.child", *(["--device"] if self._with_device else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the parent: it ends its children in good order
            )
        return self._child

    def _last_words(self) -> str:
        assert self._child is not None
        self._child.wait()
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"exit status {self._child.returncode}: {lines[-1].strip() if lines else 'no message'}"
