"""Commands for AMD cards: what they say, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_samples import run

from parallax_gen.cli import doctor
from parallax_gen.codegen import device
from parallax_gen.errors import ArgumentError, MeasureError
from parallax_gen.hub.folder import write_package
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning import installation
from parallax_gen.tuning.job import Job
from parallax_gen.tuning.tuner import Tuner

DECODE = ("--gpu", "mi300x", "--op", "decode", "--shape", "32,32/8,8192")
NOT_MEASURED = "kernels for AMD GPUs are compiled, not measured"


def findings() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("doctor", "--gpu", "mi355x", "--json").stdout)["findings"]
    return found


def test_doctor_compiles_for_a_named_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_amd.py compiles."""
    monkeypatch.setattr(doctor, "CHECKS", {})
    monkeypatch.setattr(installation, "_compiled_for", lambda gpu: ("ok", f"compiled for {gpu.arch}"))
    assert findings() == [
        {"check": "card", "status": "ok", "text": "compiled for gfx950"},
        {"check": "card", "status": "note", "text": f"AMD Instinct MI355X (gfx950): {NOT_MEASURED}"},
    ]
    of_nvidia = json.loads(run("doctor", "--gpu", "h200", "--json").stdout)["findings"]
    assert [finding["text"] for finding in of_nvidia] == ["compiled for 90"]
    assert "unknown GPU 'mi200'" in run("doctor", "--gpu", "mi200").stderr


def test_doctor_with_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is broken without ptxas and cuobjdump, which kernels do not need there."""
    checks = {name: doctor.CHECKS[name] for name in ("versions", "device", "cuobjdump")}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    monkeypatch.setattr(torch.version, "hip", "7.0.51831")
    monkeypatch.setattr(device, "gpu_here", lambda index: GPUS["mi300x"])
    monkeypatch.setattr("parallax_gen.memory.toolchain.cuda_version", lambda: "")
    report = json.loads(run("doctor", "--json").stdout)
    assert not report["broken"]
    texts = {(finding["check"], finding["status"]): finding["text"] for finding in report["findings"]}
    assert ", ROCm 7.0.51831, Triton" in texts["versions", "ok"]
    assert texts["device", "ok"] == "AMD Instinct MI300X, recognised as mi300x (in the table of GPUs)"
    assert texts["device", "note"] == f"gfx942: {NOT_MEASURED}"


def test_explain_and_export_say_that_it_is_the_default(tmp_path: Path) -> None:
    assert "the default config: this kernel and bucket have no records" in run("explain", *DECODE).stdout
    result = run("export", *DECODE, "-o", tmp_path)
    assert "the default config, not measured: no record can be used" in result.stdout
    (file,) = tmp_path.glob("decode_*.py")
    assert "\ngpu        AMD Instinct MI300X\n" in file.read_text(encoding="utf-8")


def test_no_cubins(tmp_path: Path) -> None:
    result = run("export", *DECODE, "--cubin", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: AMD Instinct MI300X runs no cubins: without them, the exported files run through Triton\n"
    )
    assert not (tmp_path / "out").exists()


def test_no_hub_package(tmp_path: Path) -> None:
    call = KernelSpec("decode", 128, "bf16", 4), Shape(1, 4, 1, 1, 1024)
    with pytest.raises(ArgumentError, match="gpu: got AMD Instinct MI300X; allowed: NVIDIA GPUs: hub packages are for"):
        write_package(tmp_path / "hub", [call], [GPUS["h200"], GPUS["mi300x"]], Memory())
    assert not (tmp_path / "hub").exists()


def test_no_tuning(store: Store) -> None:
    """Not even predictions: the cost model was fitted to NVIDIA cards."""
    job = Job(KernelSpec("decode", 128, "bf16"), Bucket(8, 1, 1024), GPUS["mi300x"])
    message = f"^AMD Instinct MI300X cannot be tuned: {NOT_MEASURED}$"
    with Tuner(store, measure=False, compilers=[]) as tuner, pytest.raises(MeasureError, match=message):
        tuner.tune(job, trials=1, time_budget_s=60.0, on_progress=lambda _: None)
    assert not store.results(job.place)
    refused = run("tune", "--op", "decode", "--shape", "8,32/8,1024", "--gpu", "mi300x")
    assert (refused.exit_code, refused.stderr) == (1, f"error: AMD Instinct MI300X cannot be tuned: {NOT_MEASURED}\n")
