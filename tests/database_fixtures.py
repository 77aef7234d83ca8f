"""Fixtures for tests of commands: an empty database, an empty folder of shipped records, and no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from parallax_gen import files as data
from parallax_gen.memory import guard, shipped
from parallax_gen.memory.store import Store
from parallax_gen.tuning.workers.worker import Worker


@pytest.fixture(autouse=True)
def shipped_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder instead of tuning_db, whose records change with every release."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(shipped, "data_dir", lambda name: folder if name == "tuning_db" else data.data_dir(name))
    return folder


@pytest.fixture(autouse=True)
def empty_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder, so that earlier guard outcomes of this machine do not matter."""
    monkeypatch.setattr(guard, "cache_dir", lambda: tmp_path / "cache")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: None)
    monkeypatch.setattr(Worker, "identify", lambda worker: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    path = tmp_path / "tuning.db"
    monkeypatch.setenv("PARALLAX_GEN_DB", str(path))
    with Store(path) as store:
        yield store
