"""Launches are counted by kernel and bucket, and written to a file. No test needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import parallax_gen
from parallax_gen.errors import ArgumentError, StoreError
from parallax_gen.memory.calls import read_calls
from parallax_gen.ops.space import default_config
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime import plan as plan_module
from parallax_gen.runtime import recording
from parallax_gen.runtime.direct_launch import DirectLaunch
from parallax_gen.runtime.plan import LaunchPlan, plan_launch
from parallax_gen.runtime.recording import CallCounts, Recording, call_counts

SPEC = KernelSpec("forward", 64, "bf16", causal=True)
SHAPE, SAME_BUCKET, OTHER = Shape(2, 4, 4, 300, 300), Shape(1, 7, 7, 280, 260), Shape(2, 4, 4, 2000, 2000)
KERNEL, OTHER_KERNEL = (SPEC, Bucket(8, 256, 256)), (SPEC, Bucket(8, 2048, 2048))
assert Bucket(8, 256, 256) == recording.bucket_of(SHAPE) == recording.bucket_of(SAME_BUCKET)
DEVICE = 0


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> CallCounts:
    """The counts of a process that made no calls yet."""
    counts = CallCounts()
    monkeypatch.setattr(recording, "call_counts", lambda: counts)
    monkeypatch.setattr(plan_module, "call_counts", lambda: counts)
    return counts


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that plans and launches a kernel so many times: through the JIT, then directly."""
    module = SimpleNamespace(launch=lambda *_: None)
    choice = SimpleNamespace(config=default_config(SPEC, SHAPE, GPUS["h200"]))
    dispatcher = SimpleNamespace(kernel=lambda *_: (choice, module))
    launched: list[str] = []

    def launch_by_jit(*_: Any) -> tuple[DirectLaunch, ...]:
        launched.append("jit")
        return (DirectLaunch(pytest.fail, (), (), (), lambda stream, addresses: launched.append("direct")),)

    monkeypatch.setattr(plan_module, "default_dispatcher", lambda: dispatcher)
    monkeypatch.setattr(plan_module, "gpu_of_device", lambda _: GPUS["h200"])
    monkeypatch.setattr(plan_module, "launch_by_jit", launch_by_jit)
    monkeypatch.setattr(plan_module, "_current_device", lambda: DEVICE)
    monkeypatch.setattr(plan_module, "_current_stream", lambda _: 1)
    x = torch.zeros(8)
    request = SimpleNamespace(q=x, r=x, k=x, v=x)

    def launch(times: int, shape: Shape = SHAPE) -> LaunchPlan:
        launched.clear()
        plan = plan_launch(SPEC, shape, (0.5,), DEVICE)
        for _ in range(times):
            plan.launch(request, (x,))
        assert launched == ["jit", "direct", "direct", "direct"][:times]
        return plan

    return launch


def test_every_launch_counts_by_kernel_and_bucket(counts: CallCounts, launch: Any) -> None:
    launch(3)
    launch(2, SAME_BUCKET)
    launch(1, OTHER)
    assert counts.totals() == Counter({KERNEL: 5, OTHER_KERNEL: 1})


def test_a_launch_on_another_device_counts_once(
    counts: CallCounts, launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = DEVICE + 1

    @contextmanager
    def device(index: int) -> Iterator[None]:
        nonlocal current
        current = index
        yield
        current = DEVICE + 1

    monkeypatch.setattr(plan_module, "_current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    launch(2)
    assert counts.totals() == Counter({KERNEL: 2})


def test_a_recording_has_the_calls_of_its_time(counts: CallCounts, launch: Any) -> None:
    plan = launch(3)
    with parallax_gen.record() as calls:
        assert calls.calls == Counter()
        plan.launch(SimpleNamespace(**dict.fromkeys("qrkv", torch.zeros(8))), (torch.zeros(8),))  # of an older plan
        launch(1, OTHER)
        assert calls.calls == Counter({KERNEL: 1, OTHER_KERNEL: 1})
    launch(2)
    assert calls.calls == Counter({KERNEL: 1, OTHER_KERNEL: 1})
    assert repr(calls) == "<2 calls of 2 kernels and buckets>"


def test_a_recording_of_nothing_stays_empty(counts: CallCounts, launch: Any, tmp_path: Path) -> None:
    with parallax_gen.record(tmp_path / "calls") as calls:
        pass
    launch(1)
    calls.stop()
    assert calls.calls == read_calls(tmp_path / "calls") == Counter()


def test_recordings_add_to_a_file(counts: CallCounts, launch: Any, tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    recording = parallax_gen.record(str(path))
    launch(2)
    recording.write()
    recording.write()
    assert read_calls(path) == Counter({KERNEL: 2})
    launch(1)
    recording.stop()
    recording.stop()
    with parallax_gen.record(path):
        launch(1, OTHER)
    assert read_calls(path) == Counter({KERNEL: 3, OTHER_KERNEL: 1})


def test_it_is_written_meanwhile(
    counts: CallCounts, launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "WRITE_EVERY_S", 0.01)
    with parallax_gen.record(tmp_path / "calls"):
        launch(2)
        end = time.monotonic() + 30
        while read_calls(tmp_path / "calls") != Counter({KERNEL: 2}) and time.monotonic() < end:
            time.sleep(0.01)
        assert read_calls(tmp_path / "calls") == Counter({KERNEL: 2})
    time.sleep(0.05)
    assert [thread for thread in threading.enumerate() if thread.name == "parallax_gen.record"] == []


def test_a_path_of_another_type_is_one_clear_error() -> None:
    with pytest.raises(ArgumentError, match=r"^path: got 5; allowed: a file's path, or None$"):
        parallax_gen.record(5)  # type: ignore[arg-type]


def test_a_file_of_anything_else_is_refused_at_once(counts: CallCounts, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("train()\n", encoding="utf-8")
    with pytest.raises(StoreError, match=r"train.py, line 1: not a kernel and its calls"):
        parallax_gen.record(tmp_path / "train.py")
    assert (tmp_path / "train.py").read_text(encoding="utf-8") == "train()\n"


# A process of its own, that makes two calls. `arguments` are code that runs before its end.
PROGRAM = """
import sys
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.recording import call_counts
count = call_counts().of(KernelSpec("forward", 64, "bf16", causal=True), Shape(2, 4, 4, 300, 300))
count.calls += 2
exec(sys.argv[1])
"""


def run(path: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    root = Path(parallax_gen.__file__).parents[1]
    return subprocess.run(
        # Python 3.12 warns of forks beside threads, which importing torch starts.
        [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", PROGRAM, code],
        env={**os.environ, "PARALLAX_GEN_RECORD": str(path)},
        cwd=root,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def test_the_environment_variable_records_to_the_end_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    for _ in range(2):
        done = run(path, "import os; os.chdir('/')")
        assert (done.returncode, done.stderr) == (0, "")
    assert run(path, "raise SystemExit(3)").returncode == 3
    assert read_calls(path) == Counter({KERNEL: 6})


def test_a_forked_child_does_not_write_its_parents_calls(tmp_path: Path) -> None:
    done = run(tmp_path / "calls", "import os; pid = os.fork(); pid and os.waitpid(pid, 0)")
    assert (done.returncode, done.stderr) == (0, "")
    assert read_calls(tmp_path / "calls") == Counter({KERNEL: 2})


def test_a_file_that_cannot_be_written_only_warns(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other\n", encoding="utf-8")
    done = run(tmp_path / "other")
    assert done.returncode == 0
    assert "PARALLAX_GEN_RECORD: calls are not recorded: " in done.stderr
    assert "other, line 1" in done.stderr
    assert (tmp_path / "other").read_text(encoding="utf-8") == "other\n"
    done = run(tmp_path / "later", f"import pathlib; pathlib.Path({str(tmp_path / 'later')!r}).write_text('other')")
    assert done.returncode == 0
    assert "calls are not recorded: " in done.stderr


def test_without_the_variable_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARALLAX_GEN_RECORD", raising=False)
    started: list[object] = []
    monkeypatch.setattr(recording, "Recording", lambda *arguments: started.append(arguments))
    assert isinstance(call_counts.__wrapped__(), CallCounts)
    monkeypatch.setenv("PARALLAX_GEN_RECORD", "")
    call_counts.__wrapped__()
    assert started == []


def test_a_recording_is_a_function_too(counts: CallCounts) -> None:
    assert isinstance(parallax_gen.record(), Recording)
