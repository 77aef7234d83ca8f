"""Workers that pretend to compile and measure, and machines with several GPUs, for tests of commands that tune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from cli_samples import H200

from parallax_gen.codegen.resources import Resources
from parallax_gen.errors import MeasureError
from parallax_gen.memory.result import Outcome
from parallax_gen.problem.hardware import Gpu
from parallax_gen.tuning import tuner as tuning
from parallax_gen.tuning.workers.messages import Compile, Measure, MeasureInterleaved, Reply, Timing

IDLE_BYTES = 2**29  # of the measuring child's own CUDA context


@dataclass(frozen=True)
class FakeDevice:
    """What the child of a device tells of it. fault: why the child cannot use it."""

    card: Gpu | None = H200
    gib: float = 0.0  # in use by others
    fault: str = ""


class FakeWorker:
    """Every kernel takes a microsecond less than the one before; the second one is wrong."""

    measured = 0
    machine: tuple[FakeDevice, ...] = ()  # by default every index is an idle H200
    measured_on: ClassVar[set[int]] = set()
    running: ClassVar[list[FakeWorker]] = []

    def __init__(self, *, device: int | None):
        self.device = device
        self.running.append(self)

    def start(self) -> None:
        pass

    @property
    def _here(self) -> FakeDevice:
        assert self.device is not None
        here = FakeDevice() if not self.machine else (*self.machine, *[FakeDevice(None)] * 99)[self.device]
        if here.fault:
            raise MeasureError(f"device {self.device} cannot be used: {here.fault}")
        return here

    def identify(self) -> Gpu | None:
        return self._here.card

    def taken_bytes(self) -> int:
        return IDLE_BYTES + round(self._here.gib * 2**30)

    def ask(self, request: Compile | Measure | MeasureInterleaved, timeout_s: float) -> Reply:
        if isinstance(request, Compile):
            return Reply(Outcome.OK, resources=Resources(100, 0, 1000))
        if isinstance(request, MeasureInterleaved):
            return Reply(Outcome.CRASH, "nothing is interleaved")
        assert self.device is not None
        self.measured_on.add(self.device)
        FakeWorker.measured += 1
        if FakeWorker.measured == 2:
            return Reply(Outcome.WRONG, "NaN")
        us = 300.0 - FakeWorker.measured
        return Reply(Outcome.OK, timing=Timing(us, us, us, 20, 50), error=1e-3)

    def kill(self) -> None:
        pass

    def close(self) -> None:
        if self in self.running:
            self.running.remove(self)


@pytest.fixture
def fake_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this machine has an H200."""
    FakeWorker.measured = 0
    FakeWorker.measured_on.clear()
    FakeWorker.running.clear()
    monkeypatch.setattr(tuning, "Worker", FakeWorker)
    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: H200)


def fake_machine(monkeypatch: pytest.MonkeyPatch, *devices: FakeDevice) -> None:
    """Pretend that this machine has these GPUs, with `fake_h200`."""
    monkeypatch.setattr(FakeWorker, "machine", devices)
    monkeypatch.setattr(tuning, "visible_devices", lambda: max(1, len(devices)))
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)  # torch does not know these GPUs
