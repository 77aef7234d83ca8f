"""Workers that pretend to compile and measure, for tests of commands that tune."""

from __future__ import annotations

import pytest
from cli_samples import H200

from parallax_gen.codegen.resources import Resources
from parallax_gen.memory.result import Outcome
from parallax_gen.problem.hardware import Gpu
from parallax_gen.tuning import tuner as tuning
from parallax_gen.tuning.workers.messages import Compile, Measure, MeasureInterleaved, Reply, Timing


class FakeWorker:
    """Every kernel takes a microsecond less than the one before; the second one is wrong."""

    measured = 0

    def __init__(self, *, device: int | None):
        pass

    def start(self) -> None:
        pass

    def identify(self) -> Gpu | None:
        return H200

    def ask(self, request: Compile | Measure | MeasureInterleaved, timeout_s: float) -> Reply:
        if isinstance(request, Compile):
            return Reply(Outcome.OK, resources=Resources(100, 0, 1000))
        if isinstance(request, MeasureInterleaved):
            return Reply(Outcome.CRASH, "nothing is interleaved")
        FakeWorker.measured += 1
        if FakeWorker.measured == 2:
            return Reply(Outcome.WRONG, "NaN")
        us = 300.0 - FakeWorker.measured
        return Reply(Outcome.OK, timing=Timing(us, us, us, 20, 50), error=1e-3)

    def kill(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def fake_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this machine has an H200."""
    FakeWorker.measured = 0
    monkeypatch.setattr(tuning, "Worker", FakeWorker)
    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: H200)
    monkeypatch.setattr("parallax_gen.cli.devices.card_of_worker", lambda bench: H200)
