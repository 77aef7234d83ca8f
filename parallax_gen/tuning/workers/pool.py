"""The tuner's child processes: some compile, and one per device measures. A thread serves each; replies share a queue.

Also counts the CPUs that are usable for compiling.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, Protocol

from parallax_gen.errors import MemoryTakenError
from parallax_gen.memory.result import Outcome
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.workers.messages import Compile, MeasureInterleaved, Reply, WorkerRequest

_LOG = logging.getLogger(__name__)

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

COMPILE_TIMEOUT_S = 120.0  # the slowest kernels take about ten seconds
MEASURE_TIMEOUT_S = 120.0  # includes the oracle at the largest shapes
CACHED_TIMEOUT_S = 30.0  # with the oracle's results cached: a request that takes longer hangs
MEMORY_WAITS_S = (2.0, 8.0, 20.0)  # between attempts while other processes hold the memory


class WorkerProtocol(Protocol):
    """The methods of `worker.Worker` that the pool uses."""

    def start(self) -> None: ...

    def ask(self, request: WorkerRequest, timeout_s: float) -> Reply: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Compilation:
    owner: int
    source_key: str
    request: Compile


@dataclass(frozen=True)
class CompletedRequest:
    """The reply to a request of `owner` (a run's number); device is None for a compilation."""

    owner: int
    request: WorkerRequest
    reply: Reply
    device: int | None = None


class Pool:
    """Owns the compiling children and one measuring child per device: closing the pool kills them.

    No two children compile the same source at the same time: the second request is held until the first is done, and
    then finds the program in Triton's cache. Only the thread that created the pool may call its methods.
    """

    def __init__(self, measuring: Mapping[int, WorkerProtocol], compilers: Sequence[WorkerProtocol]):
        self.compilers = len(compilers)
        self._completed: SimpleQueue[tuple[CompletedRequest, str] | BaseException] = SimpleQueue()
        self._to_compile: SimpleQueue[_Compilation | None] = SimpleQueue()
        self._to_measure: dict[int, SimpleQueue[tuple[int, WorkerRequest] | None]] = {
            d: SimpleQueue() for d in measuring
        }
        self._held: dict[str, deque[_Compilation]] = {}  # key of a source being compiled -> requests that wait for it
        self._forgotten: set[int] = set()
        self._workers: list[WorkerProtocol] = []
        self._threads: list[Thread] = []
        self._closing = Event()
        for device, worker in measuring.items():
            worker.start()
            self._start_thread(worker, self._measure_all, worker, device)
        for compiler in compilers:
            self._start_thread(compiler, self._compile_all, compiler)

    def compile(self, owner: int, source_key: str, request: Compile) -> None:
        """Queue a compilation. source_key: equal for instances that render the same source."""
        compilation = _Compilation(owner, source_key, request)
        if source_key in self._held:
            self._held[source_key].append(compilation)
        else:
            self._held[source_key] = deque()
            self._to_compile.put(compilation)

    def measure(self, owner: int, device: int, request: WorkerRequest) -> None:
        """Queue a request for a device, which handles one at a time."""
        self._to_measure[device].put((owner, request))

    def next(self, timeout_s: float) -> CompletedRequest | None:
        """The next completed request; None after the timeout, or for one whose owner was forgotten.

        Raises MachineError if the machine is at fault, and any other error of a worker.
        """
        try:
            reply = self._completed.get(timeout=timeout_s)
        except Empty:
            return None
        if isinstance(reply, BaseException):
            raise reply
        completed, source_key = reply
        if source_key:
            if self._held[source_key]:
                self._to_compile.put(self._held[source_key].popleft())
            else:
                del self._held[source_key]
        return None if completed.device is None and completed.owner in self._forgotten else completed

    def forget(self, owner: int) -> None:
        """Drop the queued compilations of an owner."""
        self._forgotten.add(owner)

    def close(self) -> None:
        """Kill all children and wait for the threads."""
        self._closing.set()
        _empty(self._to_compile)
        for _ in range(self.compilers):
            self._to_compile.put(None)
        for queue in self._to_measure.values():
            queue.put(None)  # after one request at most
        for worker in self._workers:
            worker.kill()  # its thread gets a crash as reply, then the None
        for thread in self._threads:
            thread.join()

    def _start_thread(self, worker: WorkerProtocol, serve: Callable[..., None], *arguments: object) -> None:
        self._workers.append(worker)
        self._threads.append(Thread(target=self._serve_safely, args=(worker, serve, *arguments), daemon=True))
        self._threads[-1].start()

    def _serve_safely(self, worker: WorkerProtocol, serve: Callable[..., None], *arguments: object) -> None:
        """Serve, and pass an exception on to `next`: if a thread ended silently, `next` would wait forever."""
        try:
            serve(*arguments)
        except BaseException as error:  # noqa: BLE001 - raised again in `next`
            self._completed.put(error)
        finally:
            worker.close()

    def _ask(self, worker: WorkerProtocol, request: WorkerRequest, timeout_s: float) -> Reply:
        """A worker's reply. Retries MEMORY_WAITS_S times while other processes hold the memory that it needs."""
        for wait_s in MEMORY_WAITS_S:
            try:
                return worker.ask(request, timeout_s)
            except MemoryTakenError as error:
                _LOG.warning("%s; trying again in %.0f s", error, wait_s)
                if self._closing.wait(wait_s):
                    raise
                timeout_s = max(timeout_s, MEASURE_TIMEOUT_S)  # the child dropped its cached inputs and oracle
        return worker.ask(request, timeout_s)

    def _compile_all(self, worker: WorkerProtocol) -> None:
        while (compilation := self._to_compile.get()) is not None:
            forgotten = compilation.owner in self._forgotten
            reply = (
                Reply(Outcome.CRASH, "given up")
                if forgotten  # nobody reads this reply
                else self._ask(worker, compilation.request, COMPILE_TIMEOUT_S)
            )
            self._completed.put(
                (CompletedRequest(compilation.owner, compilation.request, reply), compilation.source_key)
            )

    def _measure_all(self, worker: WorkerProtocol, device: int) -> None:
        cached: tuple[KernelSpec, Shape] | None = None  # the problem whose oracle results the child has cached
        while (item := self._to_measure[device].get()) is not None:
            owner, request = item
            instance = request.instances[0] if isinstance(request, MeasureInterleaved) else request.instance
            problem = instance.spec, instance.shape
            reply = self._ask(worker, request, CACHED_TIMEOUT_S if problem == cached else MEASURE_TIMEOUT_S)
            cached = None if reply.outcome.inconclusive else problem
            self._completed.put((CompletedRequest(owner, request, reply, device), ""))


def _empty(queue: SimpleQueue[Any]) -> None:
    with contextlib.suppress(Empty):
        while True:
            queue.get_nowait()


def usable_cpus() -> int:
    """How many CPUs this process may keep busy: the minimum of its affinity and its container's quota, at least 1."""
    return max(1, math.ceil(min(_affinity(), _quota())))


def _affinity() -> int:
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on; respects -X cpu_count too
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0))


def _quota() -> float:
    """The CPU quota of control groups, in CPUs: the minimum over this process's group and its parents."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    quotas = [math.inf]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the group's path may be the host's. Then the group's files are at the top of the mount.
        for top in (CGROUPS / controllers, CGROUPS / "cpu") if controllers else (CGROUPS,):
            inner = top / group.lstrip("/")
            quotas += [_quota_of(folder) for folder in (inner, *inner.parents) if folder.is_relative_to(top)]
    return min(quotas)


def _quota_of(folder: Path) -> float:
    """The CPU quota of one control group, of cgroup version 2 or 1."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period")
            )
        return math.inf if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or no valid quota in it
        return math.inf
