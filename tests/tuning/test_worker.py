"""The child process that compiles and measures: it sees one GPU, and no child process outlives its parent."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from parallax_gen.errors import MeasureError
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.space import default_config, timed_lengths
from parallax_gen.oracle.inputs import random_inputs_of
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.workers import child
from parallax_gen.tuning.workers.messages import Compile, Inspect, KernelInstance, Timing
from parallax_gen.tuning.workers.worker import Worker

INSTANCE = KernelInstance(
    KernelSpec("decode", 64, "bf16"), DecodeConfig(32, 8, 1, "none", 1, 2), Shape(1, 1, 1, 1, 128), GPUS["h200"]
)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("visible", "device", "seen"),
    [
        (None, None, ""),
        (None, 0, "0"),
        (None, 3, "3"),
        ("4,5", 1, "5"),
        (" GPU-a , MIG-b", 1, "MIG-b"),
        ("4,5", 2, ""),
        ("", 0, ""),
        ("4", None, ""),
    ],
)
def test_a_child_sees_one_device(
    visible: str | None, device: int | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index counts the devices that are visible to the parent."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    environment = Worker(device=device)._environment()
    assert environment["CUDA_VISIBLE_DEVICES"] == seen
    assert "TRITON_INTERPRET" not in environment


def test_without_a_gpu_a_child_reports_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with closing(Worker(device=0)) as worker:
        assert worker.identify() is None


def test_a_child_reports_how_much_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes' and its own context, without what its torch has reserved."""
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 15)
    assert child.answer(Inspect()) == 25


def test_a_child_that_does_not_report_its_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        closing(Worker(device=2)) as worker,
        pytest.raises(MeasureError, match=r"device 2 cannot be used: .* does not start: exit status 1"),
    ):
        worker.identify()


@pytest.fixture
def hanging_ptxas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake ptxas that prints its version and otherwise hangs, and the file with its process id."""
    import triton

    real = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    pid, script = tmp_path / "pid", tmp_path / "ptxas"
    version = f'case "$*" in *--version*) exec "{real}" "$@";; esac'
    script.write_text(f"#!/bin/sh\n{version}\necho $$ > {pid}\nexec sleep 600\n", encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    for name in ("PTXAS", "PTXAS_BLACKWELL"):  # newer Tritons use the second one for all but the oldest cards
        monkeypatch.setenv(f"TRITON_{name}_PATH", str(script))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))  # an empty cache, so that it compiles
    return pid


def test_a_ptxas_that_hangs_is_killed_with_its_child(hanging_ptxas: Path) -> None:
    """The child is killed as after a timeout, but sooner."""
    with closing(Worker(device=None)) as worker, ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(worker.ask, Compile(INSTANCE), 120.0)
        assert wait_for(lambda: hanging_ptxas.exists() and hanging_ptxas.read_text(encoding="utf-8").strip() != "")
        ptxas = int(hanging_ptxas.read_text(encoding="utf-8"))
        assert alive(ptxas)
        worker.kill()
        assert waiting.result().outcome == "crash"
        assert wait_for(lambda: not alive(ptxas))


def test_children_end_with_their_parent(hanging_ptxas: Path) -> None:
    """kill -9 of a tune leaves no process that uses a GPU."""
    code = textwrap.dedent(f"""
        from parallax_gen.ops.decode import DecodeConfig
        from parallax_gen.problem.hardware import GPUS
        from parallax_gen.problem.shapes import Shape
        from parallax_gen.problem.spec import KernelSpec
        from parallax_gen.tuning.workers.messages import Compile, KernelInstance
        from parallax_gen.tuning.workers.worker import Worker
        spec, shape = {INSTANCE.spec!r}, {INSTANCE.shape!r}
        worker = Worker(device=None)
        worker.start()
        print(worker._child.pid, flush=True)
        worker.ask(Compile(KernelInstance(spec, {INSTANCE.config!r}, shape, GPUS["h200"])), timeout_s=60.0)
    """)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, encoding="utf-8")
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert wait_for(lambda: hanging_ptxas.exists() and hanging_ptxas.read_text(encoding="utf-8").strip() != "")
        ptxas = int(hanging_ptxas.read_text(encoding="utf-8"))
        assert alive(child)
        assert alive(ptxas)
        os.kill(parent.pid, signal.SIGKILL)
        assert wait_for(lambda: not alive(child) and not alive(ptxas))
    finally:
        parent.kill()
        parent.communicate()


def test_decode_varlen_is_timed_with_each_of_several_lengths() -> None:
    spec, shape = KernelSpec("decode_varlen", 64, "bf16"), Shape(4, 2, 2, 1, 320)
    instance = KernelInstance(spec, default_config(spec, shape, GPUS["h200"]), shape, GPUS["h200"])
    spread, *_ = timed_lengths(spec, shape)
    inputs = random_inputs_of(spec, shape, seed=0, device="cpu", full=True, lengths=spread)
    timed = child._timed_inputs(instance, inputs)
    assert [x.cache_seqlens.tolist() for x in timed if x.cache_seqlens is not None] == [
        [320, 101, 32, 10],
        [320, 10, 10, 10],
    ]
    assert timed[0] is inputs
    assert timed[1].k is inputs.k
    even = replace(instance, spec=replace(spec, op="decode"))
    assert child._timed_inputs(even, inputs) == [inputs]


def test_one_of_several_interleaved_timings() -> None:
    assert Timing(30.0, 20.0, 40.0, 5, 7).per_launch(2) == Timing(15.0, 10.0, 20.0, 5, 7)
