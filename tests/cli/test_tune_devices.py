"""tune without --devices: the GPUs that it measures on, of a simulated machine with several."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_samples import run, run_json
from fake_card import FakeDevice, FakeWorker, fake_machine

from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.tuning import tuner as tuning

STEP = ("--op", "training", "--shape", "1,8,1024", "--trials", "4", "--time-budget", "60", "--workers", "1")
FREE, BUSY, H100 = FakeDevice(), FakeDevice(gib=12.4), FakeDevice(gpu_by_name("h100"))
MISSING, BROKEN = FakeDevice(None), FakeDevice(fault="CUDA-capable device(s) is/are busy or unavailable")


@pytest.mark.parametrize(
    ("machine", "options", "used", "said"),
    [
        ((FREE,), (), {0}, ""),
        ((BUSY,), (), {0}, ""),  # a single one is used as it is
        ((FREE, FREE), (), {0, 1}, "uses GPUs 0 and 1"),
        ((FREE, FREE, BUSY, FREE), (), {0, 1, 3}, "uses GPUs 0, 1 and 3; GPU 2 is in use (12.9 GiB)"),
        ((BUSY, FREE), (), {1}, "uses GPU 1; GPU 0 is in use (12.9 GiB)"),
        ((FREE, H100, FREE), (), {0, 2}, "uses GPUs 0 and 2; GPU 1 is another card (h100)"),
        ((BUSY, H100, FREE), (), {1}, "uses GPU 1; GPU 0 is another card (h200); GPU 2 is another card (h200)"),
        ((H100, FREE, BUSY), ("--gpu", "H200"), {1}, None),
        (
            (BUSY, BUSY),
            (),
            {0},
            "GPU 0 is in use (12.9 GiB), but no other is free, so it is used: times may be disturbed; "
            "GPU 1 is in use (12.9 GiB)",
        ),
        ((H100, BUSY), ("--gpu", "h200"), {1}, None),
        (
            (BROKEN, FREE),
            (),
            {1},
            "uses GPU 1; device 0 cannot be used: CUDA-capable device(s) is/are busy or unavailable",
        ),
        ((FREE, MISSING), (), {0}, "uses GPU 0; GPU 1 is not found"),
        ((FREE, FREE, BUSY), ("--devices", "0,2"), {0, 2}, ""),
    ],
)
def test_it_measures_on_all_free_devices_of_one_card(
    machine: tuple[FakeDevice, ...],
    options: tuple[str, ...],
    used: set[int],
    said: str | None,
    fake_h200: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_machine(monkeypatch, *machine)
    result = run("tune", *STEP, *options)
    assert result.exit_code == 0, result.output
    assert FakeWorker.measured_on == used
    first = result.stderr.splitlines()[0]
    assert first == said if said else first.startswith("[1/4] ") if said == "" else "GPU" in first
    assert FakeWorker.running == []


def test_without_a_device_it_predicts(fake_h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine(monkeypatch, MISSING, MISSING)
    summary = run_json("tune", *STEP)
    assert (summary["gpu"], summary["measured"]) == ("h200", False)
    assert run_json("tune", *STEP, "--gpu", "h100")["gpu"] == "h100"


@pytest.mark.parametrize(
    ("machine", "name", "status", "message"),
    [
        ((FREE, FREE), "h100", 2, "error: --gpu is h100, but the card here is h200"),
        ((FREE, FREE), "h2000", 2, "error: unknown GPU 'h2000'"),
        ((BROKEN, BROKEN), "h200", 1, "error: device 0 cannot be used: CUDA-capable"),
    ],
)
def test_no_usable_device_is_an_error(
    machine: tuple[FakeDevice, ...],
    name: str,
    status: int,
    message: str,
    fake_h200: None,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_machine(monkeypatch, *machine)
    result = run("tune", *STEP, "--gpu", name)
    assert result.exit_code == status
    assert result.stderr.startswith(message)
    assert store.all() == []
    assert FakeWorker.running == []


def test_other_children_end_before_compilers_start(fake_h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one compiler per CPU in all, less those of the devices that are used."""
    fake_machine(monkeypatch, FREE, BUSY, FREE, BUSY)
    monkeypatch.setattr(tuning, "usable_cpus", lambda: 8)
    with tuning.children(lambda measuring: [0, 2], None) as (measuring, compilers):
        assert [*measuring] == [0, 2]
        assert len(compilers) == 6
        assert {worker.device for worker in FakeWorker.running} == {0, 2, None}
    assert FakeWorker.running == []


def test_a_plan_counts_the_devices_that_are_used(fake_h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine(monkeypatch, FREE, FREE, BUSY)
    model = ("--for", "training", "--heads", "8", "--seqlen", "1024")
    planned = [run("tune", *model, *STEP[4:], *more).stderr for more in ((), ("--devices", "0"))]
    assert "4 jobs on 2 devices: 3 min at most" in planned[0]
    assert "4 jobs on 1 device: 5 min at most" in planned[1]


def test_refresh_and_storage_use_all_free_devices(
    fake_h200: None, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_machine(monkeypatch, FREE, BUSY, FREE)
    for options in (("--storage", f"journal:{tmp_path / 'journal'}"), ("--refresh",)):
        FakeWorker.measured_on.clear()
        result = run("tune", *STEP, *options)
        assert result.exit_code == 0, result.output
        assert FakeWorker.measured_on == {0, 2}
