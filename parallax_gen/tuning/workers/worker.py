"""The parent's handle on a killable child that compiles, checks and times: no kernel can crash the tuner.

Pickled requests go to the standard input of `tuning/workers/child.py`, pickled replies come from its standard output.
Only these messages are unpickled. The parent itself never touches CUDA.
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
from typing import Any

from parallax_gen.errors import MachineError, MeasureError, gist, machine_error, machine_error_of_exit
from parallax_gen.memory.result import Outcome
from parallax_gen.problem.hardware import Gpu
from parallax_gen.tuning.workers.messages import Identify, Inspect, Ready, Reply, WorkerRequest

EXIT_S = 30.0  # how long a killed child may take to exit: the driver first destroys its context
START_S = 120.0  # how long a child may take to start and to identify its GPU: imports take long on a busy machine


class Worker:
    """The parent's handle on a child. The child starts at the first request, and again after it died.

    device  the index of the only GPU that the child sees, among those visible here; None for no GPU
    """

    def __init__(self, *, device: int | None):
        self._device = device
        self._child: subprocess.Popen[bytes] | None = None
        self._log: Any = None
        self._ready = False  # whether the running child accepts requests
        self._had_device = False  # whether any child so far had a device
        self._killed = False

    def start(self) -> None:
        """Start the child before the first request, because importing torch takes seconds. Raises MachineError."""
        self._ensure_running()

    def ask(self, request: WorkerRequest, timeout_s: float) -> Reply:
        """The reply to a request. If none comes, the outcome is TIMEOUT (the child is killed) or CRASH.

        timeout_s is for the request; a child that must start first gets more time. Raises MachineError if the machine
        is at fault: the child reports it, the child does not start or was killed from outside, or its device is lost
        (a new child, started after one died, does not find it).
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
            assert isinstance(reply, Reply)
            return reply
        seconds = time.monotonic() - start
        if self._had_device and not self._killed:
            self._wait_until_ready()  # a lost device is no config's fault
        return Reply(outcome, detail, seconds=seconds)

    def identify(self) -> Gpu | None:
        """The GPU that the child sees, or None. Raises MeasureError if the child does not reply."""
        gpu = self._ask_about_device(Identify())
        assert gpu is None or isinstance(gpu, Gpu)
        return gpu

    def taken_bytes(self) -> int:
        """How much of the GPU's memory other processes and the child's CUDA context take. Raises as `identify`."""
        taken = self._ask_about_device(Inspect())
        assert isinstance(taken, int)
        return taken

    def kill(self) -> None:
        """Kill the child for good, from any thread: a thread that waits in `ask` gets CRASH."""
        self._killed = True
        child = self._child
        if child is not None:
            _kill_group(child)

    def close(self) -> None:
        """Kill the child and close its pipes."""
        if self._child is not None:
            _kill_group(self._child)
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: nothing more can be done
                self._child.wait(EXIT_S)
            for pipe in (self._child.stdin, self._child.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # the child never read a request
                    pipe.close()
            self._log.close()
            self._child = None

    def _ask_about_device(self, request: Identify | Inspect) -> object:
        try:
            self._wait_until_ready()
            return self._ask(request, START_S)
        except (TimeoutError, ChildProcessError, MachineError) as error:
            raise MeasureError(f"device {self._device} cannot be used: {error or 'no answer'}") from error

    def _wait_until_ready(self) -> None:
        """Make sure that the child accepts requests. Raises MachineError if it does not start or its device is lost."""
        self._ensure_running()
        if self._ready:
            return
        child = "a child process" if self._device is None else f"the child of device {self._device}"
        try:
            ready = self._reply(START_S)
        except TimeoutError:
            raise MachineError(f"{child} did not start within {START_S:.0f} s") from None
        except ChildProcessError as error:
            if self._killed:
                raise
            raise MachineError(f"{child} does not start: {error}") from error
        except MachineError:
            self.close()  # another child may start, for example create a CUDA context
            raise
        assert isinstance(ready, Ready)
        if self._had_device and not ready.device:
            self.close()
            raise MachineError(f"device {self._device} is lost: CUDA no longer finds it")
        self._ready, self._had_device = True, ready.device

    def _ask(self, request: object, timeout_s: float) -> object:
        """The reply of a ready child to a request. Raises as `_reply` does."""
        assert self._child is not None
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the child died, which `_reply` will show
            pickle.dump(request, self._child.stdin)
            self._child.stdin.flush()
        return self._reply(timeout_s)

    def _reply(self, timeout_s: float) -> object:
        """The child's next message. Raises TimeoutError, ChildProcessError with the child's last line, or MachineError.

        Before raising it closes the child, unless the child reported the MachineError itself.
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
            last_line, status = self._exit_report()
            self.close()
            if status is not None and not self._killed and (fault := machine_error_of_exit(status, last_line)):
                raise fault from error
            raise ChildProcessError(last_line if status is None else f"exit status {status}: {last_line}") from error
        if isinstance(reply, MachineError):
            raise reply
        return reply

    def _ensure_running(self) -> subprocess.Popen[bytes]:
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
                    start_new_session=True,  # Ctrl-C goes to the parent only; the child's own children die with it
                )
            except OSError as error:  # no room for the log, no process or no file descriptor left
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

    def _exit_report(self) -> tuple[str, int | None]:
        """The last line and exit status of a child that closed its pipes; status None if it does not exit."""
        assert self._child is not None
        try:
            status = self._child.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            return "it closed its pipes and does not end", None
        self._log.seek(0)
        lines = [line for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "no message", status


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and its own children, such as a ptxas that hangs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
