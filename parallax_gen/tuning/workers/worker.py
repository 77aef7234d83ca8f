"""The parent's side of a killable child that compiles, checks and times: whatever a kernel does, the tuner lives.

Requests go pickled to the standard input of `tuning/workers/child.py`, replies come pickled from its standard output.
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
from typing import TYPE_CHECKING, Any

from parallax_gen.errors import MachineError, MeasureError, gist, machine_error, machine_error_of_exit
from parallax_gen.memory.result import Outcome
from parallax_gen.problem.hardware import Gpu
from parallax_gen.tuning.workers.messages import Identify, Ready, Request, TrialResult

if TYPE_CHECKING:
    pass

DIES_S = 30.0  # how long a killed child may take to be gone: a driver tears its context down first
WAKES_S = 120.0  # how long a child may take to be ready, and to say which GPU it has: imports, on a busy machine


class Worker:
    """The parent's handle on a child. Started when first asked, and again after it died.

    device  the index of the one GPU that the child sees, of those that this process may use; None for none
    """

    def __init__(self, *, device: int | None):
        self._device = device
        self._child: subprocess.Popen[bytes] | None = None
        self._log: Any = None
        self._ready = False  # the child that is running
        self._had_device = False  # any child so far
        self._killed = False

    def start(self) -> None:
        """Start the child ahead of the first request: importing torch takes seconds. Raises MachineError."""
        self._running()

    def ask(self, request: Request, timeout_s: float) -> TrialResult:
        """What came of a request: TIMEOUT (the child is killed) or CRASH where no reply came.

        timeout_s is for the request; a child that must start first has more. Raises MachineError where the machine is
        at fault: what the child says so of, a child that does not start or was ended from outside, and a device that a
        new child finds no more after one died on it.
        """
        start = time.monotonic()
        try:
            self._wait_until_ready()
            reply = self._ask(request, timeout_s)
        except TimeoutError:
            outcome, detail = Outcome.TIMEOUT, f"no answer in {timeout_s:.0f} s"
        except ChildProcessError as error:
            outcome, detail = Outcome.CRASH, str(error)
        else:
            assert isinstance(reply, TrialResult)
            return reply
        seconds = time.monotonic() - start
        if self._had_device and not self._killed:
            self._wait_until_ready()  # a lost device is no config's fault
        return TrialResult(outcome, detail, seconds=seconds)

    def identify(self) -> Gpu | None:
        """The GPU that the child sees, None for none. Raises MeasureError where the child does not say."""
        try:
            self._wait_until_ready()
            gpu = self._ask(Identify(), WAKES_S)
        except (TimeoutError, ChildProcessError, MachineError) as error:
            raise MeasureError(f"device {self._device} cannot be used: {error or 'no answer'}") from error
        assert gpu is None or isinstance(gpu, Gpu)
        return gpu

    def kill(self) -> None:
        """Kill the child for good, from any thread: one that waits in `ask` gets CRASH."""
        self._killed = True
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

    def _wait_until_ready(self) -> None:
        """Have a child that may be asked. Raises MachineError where none comes up, or its device is lost."""
        self._running()
        if self._ready:
            return
        where = "a child process" if self._device is None else f"the child of device {self._device}"
        try:
            ready = self._reply(WAKES_S)
        except TimeoutError:
            raise MachineError(f"{where} did not start within {WAKES_S:.0f} s") from None
        except ChildProcessError as error:
            if self._killed:
                raise
            raise MachineError(f"{where} does not start: {error}") from error
        except MachineError:
            self.close()  # what it could not begin with, such as a context, another child may
            raise
        assert isinstance(ready, Ready)
        if self._had_device and not ready.device:
            self.close()
            raise MachineError(f"device {self._device} is lost: CUDA finds it no more")
        self._ready, self._had_device = True, ready.device

    def _ask(self, request: object, timeout_s: float) -> object:
        """What a child that is ready says to a request. Raises as `_reply` does."""
        assert self._child is not None
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died before, which its reply will show
            pickle.dump(request, self._child.stdin)
            self._child.stdin.flush()
        return self._reply(timeout_s)

    def _reply(self, timeout_s: float) -> object:
        """What the child says next. Raises TimeoutError, ChildProcessError with its last words, or MachineError.

        The child is gone then, but where it was the one to tell of the machine.
        """
        assert self._child is not None
        assert self._child.stdout is not None
        try:
            ready, _, _ = select.select([self._child.stdout], [], [], timeout_s)
            if not ready:
                self.close()
                raise TimeoutError
            reply = pickle.load(self._child.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            words, status = self._last_words()
            self.close()
            if status is not None and not self._killed and (fault := machine_error_of_exit(status, words)):
                raise fault from error
            raise ChildProcessError(words if status is None else f"exit status {status}: {words}") from error
        if isinstance(reply, MachineError):
            raise reply
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            if self._killed:
                raise ChildProcessError("killed")
            try:
                self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
                self._child = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "parallax_gen.tuning.workers.child",
                        *(["--device"] if self._device is not None else []),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._log,
                    env=self._environment(),
                    start_new_session=True,  # Ctrl-C is for the parent; and what the child starts dies with it
                )
            except OSError as error:  # no room for its log, no process, no file descriptor
                raise machine_error(error) or MachineError(gist(error)) from error
            self._ready = False
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

    def _last_words(self) -> tuple[str, int | None]:
        """What a child that closed its pipes said last, and its exit status; None where it does not end."""
        assert self._child is not None
        try:
            status = self._child.wait(DIES_S)
        except subprocess.TimeoutExpired:
            return "it closed its pipes and does not end", None
        self._log.seek(0)
        lines = [line for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "no message", status


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and all that it started, such as a ptxas that hangs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
