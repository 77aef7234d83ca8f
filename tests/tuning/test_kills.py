"""kill -9 of a tune at any moment: finished trials are stored, the database is intact, the next tune resumes."""

from __future__ import annotations

import random
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from forked import start_program
from sqlite_utils import Database

from parallax_gen.memory.store import Store

PROGRAM = Path(__file__).with_name("endless_tune.py")
AT_ONCE = 5


@pytest.mark.parametrize("rounds", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_lose_no_finished_trial_and_no_database(tmp_path: Path, rounds: int) -> None:
    path = tmp_path / "tuning.db"
    chance = random.Random(0)
    reported: Counter[str] = Counter()  # the most trials of a place that a process reported
    went_on = 0
    for round_ in range(rounds):
        outputs = [tmp_path / f"{round_}-{n}" for n in range(AT_ONCE)]
        processes = [start_program(PROGRAM, path, 100 * round_ + n, stdout=output) for n, output in enumerate(outputs)]
        while not all(output.exists() and output.stat().st_size for output in outputs):  # every process has begun
            assert all(process.is_alive() for process in processes)
            time.sleep(0.01)
        for process in processes:
            time.sleep(chance.uniform(0.0, 0.05))
            process.kill()
        for process in processes:
            process.join()
            assert process.exitcode == -9
        for output in outputs:
            lines = [
                line.split()
                for line in output.read_text(encoding="utf-8").splitlines(keepends=True)
                if line.endswith("\n")
            ]
            went_on += any(int(first) > 1 and place in reported for place, first in lines[:1])
            for place, count in lines:
                reported[place] = max(reported[place], int(count))
        with closing(Database(path)) as database:
            assert next(iter(database.query("PRAGMA integrity_check"))) == {"integrity_check": "ok"}
    with Store(path) as store:
        kept = Counter(result.place.digest for result in store.all())
        assert store.unreadable == 0
    assert sum(reported.values()) > AT_ONCE * rounds
    assert went_on
    assert {place: count for place, count in reported.items() if kept[place] < count} == {}
