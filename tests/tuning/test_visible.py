"""How many GPUs there are, by the driver, which a child asks."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parallax_gen.tuning.workers import visible


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("names", "asked", "count"),
    [(None, "echo 4", 4), ("2,5", "echo 2", 2), ("2", "echo 4", 1), ("", "echo 4", 1), (None, "exit 1", 1)],
)
def test_a_child_counts_the_visible_devices(
    names: str | None, asked: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if names is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    monkeypatch.setattr(sys, "executable", program(tmp_path / "python", asked))
    assert visible.visible_devices() == count


def test_the_child_finds_no_more_devices_than_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible.visible_devices() == max(1, torch.cuda.device_count())


@pytest.mark.parametrize(("status", "count"), [(0, 3), (100, 0)])  # 100: the driver finds no device
def test_the_driver_is_asked(status: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def device_count(pointer: Any) -> int:
        pointer._obj.value = 3
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: status, cuDeviceGetCount=device_count)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert visible.count_devices() == count


def test_without_a_driver_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert visible.count_devices() == 0
