"""Fixtures for tests of the tuner: a database, and a simulated machine instead of child processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from simulated_machine import Machine

from parallax_gen.memory.store import Store
from parallax_gen.tuning import tuner as tuning


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "tuning.db") as store:
        yield store


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(tuning, "Worker", machine.worker)
    return machine
