"""`parallax_gen.tune`, on a simulated GPU and without one."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_samples import H200
from fake_card import FakeDevice, FakeWorker, fake_machine
from rich.console import Console

import parallax_gen
from parallax_gen import KernelSpec, Shape
from parallax_gen.api import tune as module
from parallax_gen.errors import ArgumentError, StoreError, UnknownGpuError
from parallax_gen.memory.calls import add_calls
from parallax_gen.memory.ranking import RecordTable, Tier
from parallax_gen.memory.store import Store
from parallax_gen.nn import ParallaxAttention
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import bucket_of
from parallax_gen.runtime.dispatch import default_dispatcher
from parallax_gen.runtime.plan import PlanCache
from parallax_gen.tuning import progress
from parallax_gen.tuning.job import Progress
from parallax_gen.tuning.tuner import Tuner

SPEC, SHAPE = KernelSpec("decode", 64, "bf16", group=4), Shape(2, 8, 2, 1, 4096)
QUICK: dict[str, Any] = {"trials": 2, "workers": 1, "progress": False}


def test_a_model_is_tuned(fake_h200: None, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    layer = ParallaxAttention(512, 8, 2, dtype=torch.bfloat16)
    tuned = parallax_gen.tune(layer, training={"batch": 2, "seqlen": 1024}, serving=False, **QUICK)
    assert (tuned.gpu, tuned.measured, tuned.database) == ("h200", True, store.path)
    assert [kernel.call.spec.op for kernel in tuned.kernels] == ["forward", "preprocess", "dkdv", "dqdr"]
    for kernel in tuned.kernels:
        (best, *_) = store.results(module.Plan(tuned.title, [], H200, {}).place(kernel.call))
        assert (kernel.config, kernel.time_us) == (best.config, best.time_us)
    text = repr(tuned)
    assert text.startswith("ParallaxAttention: 1 layer, heads 8/2, head_dim 64, bf16; on h200\n\ntraining: batch 2, ")
    assert "best us" in text
    assert max(map(len, text.splitlines())) <= 80
    assert tuned.to_json()["steps"][0]["kernels"][0]["spec"]["op"] == "forward"
    assert capsys.readouterr() == ("", "")


def test_kernels_are_tuned(fake_h200: None, store: Store) -> None:
    (kernel,) = parallax_gen.tune(kernels=(SPEC, SHAPE), **QUICK).kernels
    assert (kernel.call.spec, kernel.call.shape) == (SPEC, SHAPE)
    assert {record.place.bucket for record in store.all()} == {bucket_of(SHAPE)}


def test_recorded_calls_are_tuned(fake_h200: None, store: Store, tmp_path: Path) -> None:
    calls = {(SPEC, bucket_of(SHAPE)): 5}
    add_calls(tmp_path / "calls.jsonl", calls)
    (from_file,) = parallax_gen.tune(calls=tmp_path / "calls.jsonl", **QUICK).kernels
    assert (from_file.call.spec, from_file.call.count) == (SPEC, 5)
    recording = parallax_gen.record()
    with pytest.raises(ArgumentError, match="calls: got a recording of no calls"):
        parallax_gen.tune(calls=recording, **QUICK)
    with recording:
        count = recording._counts.of(SPEC, SHAPE)
        count.calls += 3
    tuned = parallax_gen.tune(calls=recording, **QUICK)
    assert [kernel.call.count for kernel in tuned.kernels] == [3]
    assert repr(tuned).startswith("3 recorded calls of 1 kernel; on h200\n\nrecorded calls: all of them\n")
    (tmp_path / "other").write_text("other", encoding="utf-8")
    with pytest.raises(StoreError, match="line 1: not a kernel and its calls"):
        parallax_gen.tune(calls=str(tmp_path / "other"), **QUICK)


def test_later_calls_of_this_process_choose_anew(fake_h200: None, store: Store) -> None:
    from parallax_gen.memory.place import Place
    from parallax_gen.memory.ranking import best

    dispatcher, place = default_dispatcher(), Place("h200", SPEC, bucket_of(SHAPE))
    dispatcher.choose_anew()  # of this test's database
    plans: PlanCache[int] = PlanCache()
    plans.remember("key", 1)
    assert best(place, H200, dispatcher.memory).tier is Tier.DEFAULT
    parallax_gen.tune(kernels=(SPEC, SHAPE), **QUICK)
    assert best(place, H200, dispatcher.memory).tier is Tier.MEASURED_HERE
    assert plans == {}


def test_a_shared_table_stays(fake_h200: None) -> None:
    dispatcher, table = default_dispatcher(), RecordTable([])
    before = dispatcher.memory
    try:
        dispatcher.use(table)
        parallax_gen.tune(kernels=(SPEC, SHAPE), **QUICK)
        assert dispatcher.memory is table
    finally:
        dispatcher.use(before)


def test_without_a_card_it_predicts(
    fake_h200: None, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(FakeWorker, "identify", lambda _: None)
    tuned = parallax_gen.tune(kernels=(SPEC, SHAPE), **QUICK)
    assert (tuned.gpu, tuned.measured) == ("h200", False)
    assert "predicted us" in repr(tuned)
    assert "nothing was measured: these times are predicted, and calls do not use them" in repr(tuned)
    assert {record.outcome for record in store.all()} == {"predicted"}
    assert parallax_gen.tune(kernels=(SPEC, SHAPE), gpu="h100", **QUICK).gpu == "h100"
    with pytest.raises(UnknownGpuError, match="devices: there is no CUDA device 1 here"):
        parallax_gen.tune(kernels=(SPEC, SHAPE), devices=[1], **QUICK)
    with pytest.raises(UnknownGpuError, match="unknown GPU 'h2000'"):
        parallax_gen.tune(kernels=(SPEC, SHAPE), gpu="h2000", **QUICK)


def test_the_devices_are_of_the_named_card(fake_h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallax_gen.tune(kernels=(SPEC, SHAPE), gpu="H200", devices=[0, 1], **QUICK).gpu == "h200"
    with pytest.raises(UnknownGpuError, match=r"gpu is h100, but device 0 is h200 \(NVIDIA H200 SXM\)"):
        parallax_gen.tune(kernels=(SPEC, SHAPE), gpu="h100", **QUICK)
    cards = iter([H200, gpu_by_name("h100")])
    monkeypatch.setattr(FakeWorker, "identify", lambda _: next(cards))
    with pytest.raises(UnknownGpuError, match="devices: 1 is h100, but the first one is h200"):
        parallax_gen.tune(kernels=(SPEC, SHAPE), devices=[0, 1], **QUICK)


def test_it_measures_on_all_free_devices(
    fake_h200: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_machine(monkeypatch, FakeDevice(), FakeDevice(gib=3), FakeDevice())
    parallax_gen.tune(kernels=(SPEC, SHAPE), trials=8, workers=1)
    assert FakeWorker.measured_on == {0, 2}
    assert capsys.readouterr().err.startswith("uses GPUs 0 and 2; GPU 1 is in use (3.5 GiB)\n[1/1] ")
    parallax_gen.tune(kernels=(SPEC, SHAPE), **QUICK)
    assert capsys.readouterr() == ("", "")


def test_memory_of_this_process_is_not_in_use(fake_h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its calls run on the current device, so that device's card is tuned."""
    fake_machine(monkeypatch, FakeDevice(gpu_by_name("h100")), FakeDevice(gib=9), FakeDevice(gib=9), FakeDevice())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * 2**30 if device == 1 else 0)
    monkeypatch.setattr(module, "gpu_here", lambda: H200)
    parallax_gen.tune(kernels=(SPEC, SHAPE), **QUICK | {"trials": 8})
    assert FakeWorker.measured_on == {1, 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "model, kernels, calls: got none of them; allowed: one of them"),
        ({"model": "m", "calls": "c"}, "model, kernels, calls: got model and calls; allowed: one of them"),
        ({"calls": "c", "training": True}, "training: got True; allowed: this only with a model"),
        ({"calls": 1}, "calls: got 1; allowed: a file's path, or what parallax_gen.record returned"),
        ({"kernels": (SPEC, SHAPE), "trials": 0}, "trials: got 0; allowed: an int of 1 or more"),
        ({"kernels": (SPEC, SHAPE), "trials": True}, "trials: got True"),
        ({"kernels": (SPEC, SHAPE), "time_budget_s": 0}, "time_budget_s: got 0; allowed: a number above 0"),
        ({"kernels": (SPEC, SHAPE), "time_budget_s": float("nan")}, "time_budget_s: got nan"),
        ({"kernels": (SPEC, SHAPE), "devices": []}, "devices: got (); allowed: one or more different indices"),
        ({"kernels": (SPEC, SHAPE), "devices": [0, 0]}, "devices: got (0, 0)"),
        ({"kernels": (SPEC, SHAPE), "devices": ["0"]}, "devices: got ('0',)"),
        ({"kernels": (SPEC, SHAPE), "workers": 0}, "workers: got 0; allowed: an int of 1 or more"),
    ],
)
def test_bad_arguments_are_named(fake_h200: None, store: Store, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        parallax_gen.tune(**arguments)
    assert str(error.value).startswith(message)
    assert store.all() == []


def test_another_thread_may_tune(fake_h200: None, store: Store) -> None:
    """Python handles signals in the main thread alone."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(parallax_gen.tune(kernels=(SPEC, SHAPE), **QUICK)))
    thread.start()
    thread.join(60)
    assert [tuned.measured for tuned in found] == [True]


def test_progress_goes_to_standard_error(fake_h200: None, capsys: pytest.CaptureFixture[str]) -> None:
    parallax_gen.tune(kernels=(SPEC, SHAPE), trials=2, workers=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"[1/1] h200: {SPEC}; {bucket_of(SHAPE)}\n")


@pytest.mark.parametrize("with_widgets", [False, True])
def test_progress_in_a_notebook_is_live_if_rich_can_show_it(
    with_widgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO(), force_jupyter=True, force_terminal=False)
    monkeypatch.setattr(progress, "find_spec", lambda name: SimpleNamespace() if with_widgets else None)
    assert progress.is_live(console) == with_widgets
    assert progress.is_live(Console(file=io.StringIO(), force_terminal=True))
    assert not progress.is_live(Console(file=io.StringIO(), force_terminal=False, force_jupyter=False))


def test_an_interrupt_ends_the_children(fake_h200: None, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    original = FakeWorker.close
    monkeypatch.setattr(FakeWorker, "close", lambda worker: (closed.append("closed"), original(worker)))

    def interrupted(*_: Any, **__: Any) -> list[Progress]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tuner, "tune_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        parallax_gen.tune(kernels=(SPEC, SHAPE), **QUICK)
    assert closed != []
