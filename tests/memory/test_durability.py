"""Durability of the database: killed processes, eight concurrent processes, a full disk.

Child processes are forked from one small process that has imported the store, which makes them cheap.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from memory_samples import PLACE, result

from parallax_gen.errors import StoreError
from parallax_gen.memory.result import Result
from parallax_gen.memory.store import Store, _transaction

COMMON = """
import os, pathlib, random, signal, sys, time
from memory_samples import PLACE, config, result
from parallax_gen.memory.store import Store

folder = pathlib.Path(sys.argv[1])

def fork(work, *arguments):
    "A child that does the work: its process and a pipe that it may tell numbers through."
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            work(write, *arguments)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    os.close(write)
    return child, os.fdopen(read, "rb")

def numbers(text):
    "What a child has told, as far as it got."
    return [int(line) for line in text.split(b"\\n")[:-1]]
"""


def run_forking(script: str, *arguments: object) -> str:
    """The output of COMMON followed by a script."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Python 3.12 warns of forks beside threads, which importing numpy may start; the children only write.
    quiet = ("-W", "ignore:This process:DeprecationWarning")
    command = [sys.executable, *quiet, "-c", COMMON + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


# Ten databases, five kills each: the first while the database is created, the others soon after a process has
# reported some rows. One process in five writes many rows in one transaction: all or none of them must be stored.
KILLS = """
def record(pipe, path, first):
    with Store(path) as store:
        for n in range(first, first + MOST):
            store.save(result(block_n=n))
            os.write(pipe, b"%d\\n" % n)
        time.sleep(60)

def merge(pipe, path, first):
    with Store(path) as store:
        for n in range(first, first + MOST, MANY):
            store.merge([result(block_n=n + i) for i in range(MANY)])
            os.write(pipe, b"%d\\n" % n)
        time.sleep(60)

MOST, MANY, MERGES = 1000, 50, 3
rng, killed, kept = random.Random(0), 0, 0
for database in range(10):
    path, wanted = folder / f"{database}.db", set()
    for attempt in range(5):
        many = attempt == MERGES
        child, pipe = fork(merge if many else record, path, attempt * MOST)
        if attempt == 0:
            time.sleep(rng.uniform(0, 0.03))
            text = b""
        else:
            text = b"".join(pipe.readline() for _ in range(rng.randint(1, 2 if many else 6)))
            time.sleep(rng.uniform(0, 0.004))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        for n in numbers(text + pipe.read()):
            wanted |= {config(n + i) for i in range(MANY if many else 1)}
        with Store(path, read_only=True) as reader:
            there = {r.config for r in reader.results(PLACE)}
            assert reader.problems() == []
        assert wanted <= there, (path, len(wanted - there))
        assert len([c for c in there if c.BLOCK_N // MOST == MERGES]) % MANY == 0
    with Store(path) as store:  # the next run goes on
        store.save(result(block_n=7, time_us=1.0, day=2))
        assert store.results(PLACE)[0] == result(block_n=7, time_us=1.0, day=2)
    kept += len(wanted)
print(killed, kept)
"""


def test_fifty_kills_lose_nothing(tmp_path: Path) -> None:
    killed, kept = map(int, run_forking(KILLS, tmp_path).split())
    assert killed == 50
    assert kept >= 10 * (3 + 50)  # each process but the first has reported some rows


KILLED_WITH_A_JOURNAL = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("pragma journal_mode = delete")
db.execute("pragma cache_size = 1")  # so that changed pages reach the file before the end of the transaction
db.execute("begin")
db.execute("update measurements set created_at = created_at || 'x'")
os._exit(0)
"""


def test_a_reader_undoes_what_a_killed_process_began(tmp_path: Path) -> None:
    """Not only the next writer: until then the file would be damaged for every reader."""
    path = tmp_path / "tuning.db"
    with Store(path) as store:
        store.merge([result(block_n=n) for n in range(300)])
        stored = store.results(PLACE)
    subprocess.run([sys.executable, "-c", KILLED_WITH_A_JOURNAL, str(path)], check=True)
    assert Path(f"{path}-journal").stat().st_size
    with Store(path, read_only=True) as reader:
        assert len(reader.results(PLACE)) == 300
        assert reader.results(PLACE) == stored
        assert reader.problems() == []


EIGHT_PROCESSES = """
def use(pipe, path, process):
    seen = 0
    with Store(path) as store, Store(path, read_only=True) as reader:
        for n in range(8):
            mine = 100 * process + n
            store.save(result(block_n=mine, time_us=100.0 + mine))
            rows = reader.results(PLACE)  # on the connection that dispatch has
            assert config(mine) in {r.config for r in rows}
            assert len(rows) >= seen, "a row is gone"
            seen = len(rows)
            best, later = reader.results(PLACE)[0], reader.results(PLACE)  # between which others record faster ones
            assert best in later and later[0].time_us <= best.time_us <= rows[0].time_us
            assert reader.unreadable == 0

path = folder / "tuning.db"
children = [fork(use, path, process) for process in range(8)]
assert [os.waitpid(child, 0)[1] for child, _ in children] == [0] * 8
with Store(path, read_only=True) as store:
    assert {r.config for r in store.all()} == {config(100 * p + n) for p in range(8) for n in range(8)}
    assert store.problems() == []
print("ok")
"""


def test_eight_processes_record_and_read_at_once(tmp_path: Path) -> None:
    assert run_forking(EIGHT_PROCESSES, tmp_path) == "ok\n"


# A limit on file size makes writing fail in the middle of a transaction, as on a full disk.
FULL_DISK = """
import resource
from parallax_gen.errors import StoreError

def fill(pipe, path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    with Store(path) as store:
        try:
            for n in range(10_000):
                store.save(result(block_n=n))
                os.write(pipe, b"%d\\n" % n)
        except StoreError as error:
            assert str(path) in str(error) and "PARALLAX_GEN_DB" in str(error), error
            assert len(store.results(PLACE)) == n  # it can still be read
            return
        raise AssertionError("the disk was never full")

path = folder / "tuning.db"
child, read = fork(fill, path)
recorded = numbers(read.read())
assert os.waitpid(child, 0)[1] == 0
assert len(recorded) > 10
with Store(path) as store:
    assert store.problems() == []
    assert {r.config for r in store.all()} == {config(n) for n in recorded}
    store.save(result(block_n=len(recorded)))
print("ok")
"""


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    assert run_forking(FULL_DISK, tmp_path) == "ok\n"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "tuning.db") as store:
        yield store


def test_sqlites_error_for_a_full_disk(store: Store) -> None:
    store.save(result())
    store._db.execute("PRAGMA max_page_count = 5")
    with pytest.raises(StoreError, match=r"tuning\.db: database or disk is full\. PARALLAX_GEN_DB"):
        store.merge(result(block_n=n) for n in range(1000))
    assert store.all() == [result()]


def test_a_merge_that_fails_adds_nothing(store: Store) -> None:
    def some() -> Iterable[Result]:
        yield result(block_n=1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.merge(some())
    assert store.all() == []
    assert store.merge([result(block_n=1), result(block_n=1)]) == (1, 0, 1)


def test_reads_do_not_wait_for_writers(store: Store) -> None:
    """An open transaction, as of a stopped process, does not block readers."""
    store.save(result())
    with Store(store.path, read_only=True) as reader, _transaction(store._db):
        assert reader.results(PLACE) == [result()]
