"""One database used by several threads and processes at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from forked import start as start_forked
from memory_samples import CHILD_ENVIRONMENT, PLACE, best_of, config, result

from parallax_gen.memory.store import Store

# Threads


def test_any_thread_may_read(store: Store, path: Path) -> None:
    for n in range(50):
        store.save(result(block_n=n))
    with Store(path, read_only=True) as reader, ThreadPoolExecutor(4) as threads:
        actual = list(threads.map(lambda _: len(reader.results(PLACE)), range(40)))
        assert actual == [50] * 40
        with pytest.raises(sqlite3.ProgrammingError, match="thread"):
            threads.submit(store.results, PLACE).result()


def test_threads_that_read_take_turns(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they did not, one thread got the rows of another's statement, rarely, on a machine with many cores."""
    store.save(result())
    version, reading, most = Store._version, list[int](), 0

    def slow_version(*arguments: Any) -> int:
        nonlocal most
        reading.append(1)
        most = max(most, len(reading))
        time.sleep(0.01)
        reading.pop()
        return version(*arguments)

    with Store(path, read_only=True) as reader, ThreadPoolExecutor(4) as threads:
        monkeypatch.setattr(Store, "_version", slow_version)
        assert list(threads.map(lambda _: len(reader.results(PLACE)), range(8))) == [1] * 8
    assert most == 1


# Processes


def record_many(paths: list[Path], start: object, process: int) -> None:
    for path in paths:
        start.wait()  # type: ignore[attr-defined]
        with Store(path) as store:
            for n in range(25):
                store.save(result(block_n=100 * process + n))


def test_eight_processes_create_and_fill_one_database(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.db" for n in range(4)]  # several rounds, since a race does not show every time
    start = multiprocessing.get_context("forkserver").Barrier(8, timeout=60)
    processes = [start_forked(record_many, paths, start, n) for n in range(8)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    for path in paths:
        with Store(path) as store:
            assert {r.config for r in store.results(PLACE)} == {
                config(100 * p + n) for p in range(8) for n in range(25)
            }


RECORD_FOREVER = """
import itertools, pathlib, sys
from memory_samples import result
from parallax_gen.memory.store import Store
with Store(pathlib.Path(sys.argv[1])) as store:
    for n in itertools.count():
        store.save(result(block_n=n))
        print(n, flush=True)
"""


def test_recorded_rows_survive_a_kill(path: Path) -> None:
    command = [sys.executable, "-c", RECORD_FOREVER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", env=CHILD_ENVIRONMENT) as child:
        assert child.stdout is not None
        printed = [child.stdout.readline() for _ in range(40)]
        os.kill(child.pid, signal.SIGKILL)
        printed += child.stdout.readlines()
    recorded = {config(int(line)) for line in printed if line.endswith("\n")}
    assert len(recorded) >= 40
    with Store(path, read_only=True) as reader:
        assert recorded <= {r.config for r in reader.all()}
    with Store(path) as store:
        store.save(result(time_us=1.0, block_n=1))
        assert best_of(store) == result(time_us=1.0, block_n=1)
