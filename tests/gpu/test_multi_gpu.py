"""On several cards: ring attention over NCCL compared with one card, shared records, and a tune on all cards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallax_gen.tuning.workers.visible import visible_devices

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
EXAMPLE = Path(__file__).parents[2] / "examples" / "ring_attention.py"


def run(*arguments: str, database: Path) -> str:
    environment = os.environ | {"PARALLAX_GEN_DB": str(database), "NCCL_NVLS_ENABLE": "0"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, encoding="utf-8", timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("mask", [(), ("--full",)], ids=["causal", "full"])
def test_ring_attention_and_shared_records(mask: tuple[str, ...], tmp_path: Path) -> None:
    """The example checks output and gradients, and that all ranks choose the same kernels."""
    printed = run(str(EXAMPLE), "--tokens", "8192", *mask, database=tmp_path / "tuning.db")
    ranks = torch.cuda.device_count()
    assert f"{ranks} ranks choose from the same " in printed
    assert all(f"  {name}: off by " in printed for name in ("out", "dq", "dr", "dk", "dv"))
    assert "8192 tokens, step: " in printed


def test_a_tune_uses_all_free_devices(tmp_path: Path) -> None:
    """All that there are, unless earlier tests of this process hold memory of some: that is for the tune in use."""
    assert visible_devices() == torch.cuda.device_count()
    environment = os.environ | {"PARALLAX_GEN_DB": str(tmp_path / "tuning.db")}
    shape = ("--op", "decode", "--shape", "1,8,1024", "--trials", "2", "--time-budget", "60")
    command = [sys.executable, "-m", "parallax_gen.cli", "tune", *shape]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr
    used, *left_out = done.stderr.splitlines()[0].split("; ")
    *others, last = map(str, range(torch.cuda.device_count()))
    if torch.cuda.is_initialized():
        assert used.startswith("uses GPU")
        assert all(" is in use (" in reason for reason in left_out)
    else:
        assert (used, left_out) == (f"uses GPUs {', '.join(others)} and {last}", [])


def test_all_devices_tune(tmp_path: Path) -> None:
    devices = ",".join(map(str, range(torch.cuda.device_count())))
    shapes = [part for keys in (1024, 2048, 4096, 8192) for part in ("--shape", f"1,8,{keys}")]
    budget = ("--trials", "6", "--time-budget", "60", "--json")
    tune = ("-m", "parallax_gen.cli", "tune", "--op", "decode", *shapes, *budget, "--devices", devices)
    jobs = json.loads(run(*tune, database=tmp_path / "tuning.db"))["jobs"]
    assert [job["outcome"] for job in jobs] == ["ok"] * 4
    assert [job["trials"] for job in jobs] == [6] * 4
