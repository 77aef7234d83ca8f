"""A simulated machine for the tuner: fake workers without child processes, whose replies the test defines."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from parallax_gen.codegen.resources import Resources
from parallax_gen.memory.result import Outcome
from parallax_gen.ops.base import KernelConfig
from parallax_gen.tuning.workers.messages import (
    Compile,
    Measure,
    MeasureInterleaved,
    Reply,
    Timing,
    WorkerRequest,
)

FINE = Resources(registers=100, spills=0, shared_bytes=1000)


def timed(us: float, kind: Outcome = Outcome.OK) -> Reply:
    return Reply(kind, timing=timing(us), error=1e-3)


def timing(us: float) -> Timing:
    return Timing(us, us - 1, us + 1, 20, 50)


@dataclass
class Machine:
    """The replies of the fake workers, by config and by the number of earlier requests of the same kind."""

    compile: Callable[[KernelConfig, int], Reply] = lambda config, n: Reply(Outcome.OK, resources=FINE, seconds=0.5)
    measure: Callable[[KernelConfig, int], Reply] = lambda config, n: timed(100.0 + n)
    interleaved: Callable[[MeasureInterleaved], Reply] = lambda request: Reply(Outcome.CRASH, "nothing is interleaved")
    compiled: list[KernelConfig] = field(default_factory=list)
    measured: list[Measure] = field(default_factory=list)
    interleaved_requests: list[MeasureInterleaved] = field(default_factory=list)
    on: list[tuple[int, WorkerRequest]] = field(default_factory=list)  # (device, request), in order
    open_workers: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def worker(self, *, device: int | None) -> FakeWorker:
        self.open_workers += 1
        return FakeWorker(self, device)


class FakeWorker:
    """A `Worker` without a child process."""

    def __init__(self, machine: Machine, device: int | None):
        self._machine, self._device, self._open = machine, device, True

    def start(self) -> None:
        assert self._open

    def ask(self, request: WorkerRequest, timeout_s: float) -> Reply:
        assert timeout_s > 0
        machine = self._machine
        if isinstance(request, Compile):
            assert self._device is None
            with machine.lock:
                machine.compiled.append(request.instance.config)
                n = len(machine.compiled) - 1
            return machine.compile(request.instance.config, n)
        assert self._device is not None
        with machine.lock:
            machine.on.append((self._device, request))
            if isinstance(request, Measure):
                machine.measured.append(request)
            else:
                machine.interleaved_requests.append(request)
            n = len(machine.measured) - 1
        return (
            machine.interleaved(request)
            if isinstance(request, MeasureInterleaved)
            else machine.measure(request.instance.config, n)
        )

    def kill(self) -> None:
        pass

    def close(self) -> None:
        with self._machine.lock:
            self._machine.open_workers -= self._open
            self._open = False
