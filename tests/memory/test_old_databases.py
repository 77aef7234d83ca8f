"""Databases older than fingerprints: all their rows are read, and a read-only user does not change them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from memory_samples import PLACE, config, result

from parallax_gen.files import data_dir
from parallax_gen.memory import store as store_module
from parallax_gen.memory.store import APPLICATION_ID, Store
from parallax_gen.ops.base import config_to_json
from parallax_gen.problem.spec import OPS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "on the way" / "tuning?.db"  # characters that a URI must quote


KEY = PLACE.flat() | {"environment.templates": "abc123", "environment.triton": "3.6", "environment.protocol": 1}
OLD_COLUMNS = {
    "gpu": PLACE.gpu,
    "op": PLACE.spec.op,
    "config_json": config_to_json(config()),
    "outcome": "ok",
    "time_us": 12.5,
    "error": float("inf"),
    "detail": "",
    "created_at": "2026-01-01T00:00:00+00:00",
    "source": "here",
}


def make_old_database(path: Path) -> None:
    """Create a database with two good rows of one config by two toolchains, a failure, and three unusable rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    newer = json.dumps(KEY | {"environment.cuda": "12.8/12.9"})
    rows: list[dict[str, object]] = [
        {"key_digest": "1", "key_json": json.dumps(KEY)},
        {"key_digest": "2", "key_json": newer, "time_us": 11.5},
        {"key_digest": "2", "key_json": newer, "config_json": config_to_json(config(32)), "outcome": "crash"},
        {"key_digest": "3", "key_json": "{"},
        {"key_digest": "4", "key_json": json.dumps(KEY | {"environment.triton": 3.6})},
        {"key_digest": "5", "key_json": json.dumps(KEY), "created_at": "2026-01-02T00:00:00+00:00"},  # a duplicate
    ]
    with closing(sqlite3.connect(path)) as old, old:
        old.executescript((data_dir("tuning_db") / "migrations" / "0001_results.sql").read_text(encoding="utf-8"))
        old.execute("PRAGMA user_version = 1")
        old.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        for row in (OLD_COLUMNS | row for row in rows):
            marks = ", ".join("?" * len(row))
            old.execute(f"INSERT INTO results ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))


@pytest.mark.parametrize("read_only", [False, True], ids=["written to", "read"])
def test_an_old_database_opens_with_all_its_rows(path: Path, read_only: bool) -> None:
    make_old_database(path)
    before = path.read_bytes()
    with Store(path, read_only=read_only) as store:
        actual = store.results(PLACE)
        assert [(r.outcome, r.time_us, r.config, r.evidence.cuda) for r in actual] == [
            ("ok", 11.5, config(), "12.8/12.9"),
            ("ok", 12.5, config(), ""),
            ("crash", 12.5, config(32), "12.8/12.9"),
        ]
        assert {(r.evidence.templates, r.evidence.kernel, r.evidence.triton) for r in actual} == {("abc123", "", "3.6")}
        assert {r.error for r in actual} == {float("inf")}
        assert store.in_trial_order()[0] == actual[1]
        assert store.schema == 4
        assert {r.trial for r in actual} == {None}  # nobody knows whether they are in the order of trials
        assert len(store.unreadable_rows()) == 3  # they stay in the database
    if read_only:
        assert path.read_bytes() == before  # an older version may still use it
    with Store(path) as store:
        store.save(result(day=2))
        assert len(store.results(PLACE)) == 4
    with Store(path, read_only=True) as store:
        assert len(store.results(PLACE)) == 4
        assert len(store.problems()) == 3


def test_a_call_converts_only_its_own_place_of_an_old_database(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_old_database(path)
    count = 5000
    with closing(sqlite3.connect(path)) as old, old:
        elsewhere = json.dumps(KEY | {"bucket.kv_rows": 8})
        row = OLD_COLUMNS | {"key_json": elsewhere}
        marks = ", ".join("?" * (len(row) + 1))
        old.executemany(
            f"INSERT INTO results ({', '.join(row)}, key_digest) VALUES ({marks})",
            [(*row.values(), f"more {i}") for i in range(count)],
        )
    with Store(path, read_only=True) as store:
        monkeypatch.setattr(Store, "_migrated_copy", property(lambda _: pytest.fail("all of it was converted")))
        assert [r.outcome for r in store.results(PLACE)] == ["ok", "ok", "crash"]
        assert store.results(dataclasses.replace(PLACE, gpu="h100")) == []
    monkeypatch.undo()
    with Store(path, read_only=True) as reader:
        assert len(reader.results(PLACE)) == 3
        with Store(path) as writer:  # which migrates the database meanwhile
            writer.save(result(day=2))
        assert len(reader.results(PLACE)) == 4


def test_each_place_of_an_old_database_is_found(tmp_path: Path) -> None:
    """A file of an earlier version, with places of every op."""
    path = shutil.copy(Path(__file__).parents[1] / "data" / "same" / "of_431f796.db", tmp_path)
    with Store(path, read_only=True) as store:
        all_results = store.all()
        assert {result.place.spec.op for result in all_results} == set(OPS)
        for place in dict.fromkeys(result.place for result in all_results):
            assert store.results(place) == [result for result in all_results if result.place == place]


def test_a_database_from_before_trial_numbers_is_read_and_gets_numbers(path: Path) -> None:
    """A read-only one is not migrated, and lacks the column."""
    with Store(path) as store:
        store.save(result(block_n=16))
        store._db.execute("ALTER TABLE measurements DROP COLUMN trial")
        store._db.execute("PRAGMA user_version = 3")
    with Store(path, read_only=True) as store:
        assert store.schema == 3
        assert store.results(PLACE) == store.all() == store.in_trial_order() == [result(block_n=16)]
        assert store.fastest(PLACE.gpu, PLACE.spec.op) == [result(block_n=16)]
        assert store.unreadable_rows() == []
    with Store(path) as store:
        store.save_trial(result(block_n=32))
        store.save_trial(result(block_n=16, day=2))  # timed again: when it was first tried is still unknown
        assert [(r.config, r.trial) for r in store.in_trial_order()] == [(config(16), None), (config(32), 1)]


def test_an_interrupted_migration_leaves_the_database_unchanged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_old_database(path)
    statements = store_module._statements

    def interrupt(script: str) -> Iterator[str]:
        yield from list(statements(script))[:-1]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_statements", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Store(path)
    with Store(path) as store:
        assert len(store.results(PLACE)) == 3
