"""The database: which rows it keeps, invalid files, concurrent processes."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_samples import (
    CHILD_ENVIRONMENT,
    EVIDENCE,
    OTHER_BUCKET,
    OTHER_GPU,
    OTHER_KERNEL,
    OTHER_TRITON,
    PLACE,
    SHAPE,
    best_of,
    config,
    result,
)

from parallax_gen.errors import ParallaxGenError, StoreError
from parallax_gen.files import data_dir
from parallax_gen.memory.lines import read_file, write_lines
from parallax_gen.memory.result import Outcome
from parallax_gen.memory.store import Store, default_path
from parallax_gen.ops.decode import DecodeConfig

# Stored rows


@pytest.mark.parametrize("outcome", Outcome)
def test_a_result_round_trips(store: Store, outcome: str) -> None:
    full = {"time_us_p20": 99.0, "time_us_p80": 101.5, "error": 1e-3, "registers": 168, "spills": 0}
    more = {"shape": SHAPE, "shared_bytes": 98304, "compile_s": 2.5, "detail": "naïve\n✓", "source": "here"}
    sent = result(outcome, **full, **more)
    store.save(sent)
    assert store.results(PLACE) == [sent]
    assert store.all() == [sent]
    assert sent.measured == (outcome == "ok")


def test_an_infinite_error_is_kept(store: Store) -> None:
    store.save(result("wrong", error=float("inf")))
    assert [r.error for r in store.results(PLACE)] == [float("inf")]


def test_results_of_a_place_include_all_kernels_and_toolchains_measured_first(store: Store) -> None:
    for sent in (
        result("predicted", 1.0, block_n=16),
        result("predicted", 2.0, block_n=32),
        result("ok", 90.0, block_n=64),
        result("ok", 80.0, block_n=128),
        result("ok", 85.0, block_n=128, evidence=OTHER_TRITON),
        result("ok", 95.0, block_n=128, evidence=OTHER_KERNEL),
        result("slow", block_n=256),
        result("ok", 1.0, place=OTHER_GPU),
    ):
        store.save(sent)
    assert best_of(store) == result("ok", 80.0, block_n=128)
    assert [r.time_us for r in store.results(PLACE)] == [80.0, 85.0, 90.0, 95.0, 1.0, 2.0, None]


def test_fastest_is_the_best_per_place_of_a_gpu_and_op(store: Store) -> None:
    for sent in (
        result("ok", 90.0, block_n=64),
        result("ok", 80.0, block_n=128),
        result("predicted", 1.0, block_n=16),
        result("ok", 30.0, place=OTHER_BUCKET),
        result("slow", 20.0, evidence=OTHER_TRITON),
        result("ok", 1.0, place=OTHER_GPU),
    ):
        store.save(sent)
    actual = store.fastest(PLACE.gpu, PLACE.spec.op)
    assert sorted(actual, key=lambda r: r.time_us or 0) == [*store.results(OTHER_BUCKET), best_of(store)]
    assert store.fastest(PLACE.gpu, "decode") == []


def test_all_lists_by_gpu_and_op(store: Store) -> None:
    decode = dataclasses.replace(PLACE, spec=dataclasses.replace(PLACE.spec, op="decode", causal=False))
    rows = [result(place=OTHER_GPU), result(), result(place=decode, config=DecodeConfig(64, 8, 4, "last", 4, 2))]
    for row in rows:
        store.save(row)
    assert store.all() == [rows[0], rows[2], rows[1]]  # by place
    assert store.all(gpu="h200") == [rows[2], rows[1]]
    assert store.all(op="forward") == [rows[0], rows[1]]
    assert store.all("h100", "decode") == []


def test_in_order_is_the_order_of_first_trials(store: Store) -> None:
    first, second, third = (result(time_us=time, block_n=n) for time, n in ((3.0, 64), (1.0, 16), (2.0, 32)))
    for row in (first, second, third):
        store.save(row)
    newer = result(time_us=4.0, block_n=64, day=2)
    store.save(newer)
    assert store.in_trial_order() == [newer, second, third]


def numbers(store: Store) -> list[tuple[int, int | None]]:
    """(BLOCK_N, trial) in the order of trials."""
    return [(r.config.BLOCK_N, r.trial) for r in store.in_trial_order()]  # type: ignore[attr-defined]


def test_each_trial_of_a_place_gets_the_next_number(store: Store) -> None:
    store.save(result("predicted", block_n=16))
    store.save_trial(result("wrong", block_n=32))
    store.save_trial(result(block_n=64))
    store.save_trial(result(place=OTHER_BUCKET, block_n=64))
    store.save_trial(result(block_n=64, evidence=OTHER_TRITON))  # another study: the place's numbers go on
    store.save(result(block_n=32, day=2))  # timed again: it keeps its number
    store.save_trial(result(block_n=16, day=2))  # a prediction was no trial
    trials = {
        (r.place.bucket.kv_rows, r.place.bucket.seqlen_kv, r.config, r.evidence.triton): r.trial for r in store.all()
    }
    at = PLACE.bucket.kv_rows, PLACE.bucket.seqlen_kv
    assert trials == {
        (*at, config(32), EVIDENCE.triton): 1,
        (*at, config(64), EVIDENCE.triton): 2,
        (*at, config(64), OTHER_TRITON.triton): 3,
        (*at, config(16), EVIDENCE.triton): 4,
        (OTHER_BUCKET.bucket.kv_rows, OTHER_BUCKET.bucket.seqlen_kv, config(64), EVIDENCE.triton): 1,
    }


def test_trial_numbers_survive_export_and_import(store: Store, tmp_path: Path) -> None:
    for n, time_us in ((64, 3.0), (16, 1.0), (32, 2.0)):
        store.save_trial(result(time_us=time_us, block_n=n))
    write_lines(tmp_path / "mine.jsonl", store.all())  # from fast to slow
    for source in (tmp_path / "mine.jsonl", store.path):
        with Store(tmp_path / f"{source.stem}.imported") as other:
            other.merge(read_file(source).results)
            assert numbers(other) == [(64, 1), (16, 2), (32, 3)]
            other.merge([result(block_n=16, time_us=5.0, day=2)])  # a newer time, without a number
            other.save_trial(result(block_n=128))
            assert numbers(other) == [(64, 1), (16, 2), (32, 3), (128, 4)]


def test_imported_results_without_numbers_get_none_and_come_first(store: Store) -> None:
    store.save_trial(result(block_n=64))
    store.merge([result(block_n=32), result(block_n=16)])
    assert numbers(store) == [(32, None), (16, None), (64, 1)]


def test_rows_persist_after_closing(path: Path) -> None:
    with Store(path) as store:
        store.save(result())
    with Store(path) as store, Store(path, read_only=True) as reader:
        assert best_of(store) == best_of(reader) == result()
    with pytest.raises(sqlite3.ProgrammingError):
        best_of(store)  # using a closed store is a bug, not a bad file


def test_default_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PARALLAX_GEN_DB", str(tmp_path / "mine.db"))
    assert default_path() == tmp_path / "mine.db"
    with Store() as store:
        assert store.path == default_path()
    monkeypatch.delenv("PARALLAX_GEN_DB")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "parallax_gen" / "tuning.db"


# Which of two rows is kept

REMAINS = [
    # stored     new        kept
    ("ok", 1, "predicted", 2, "ok"),
    ("crash", 1, "predicted", 2, "crash"),
    ("invalid", 1, "predicted", 2, "invalid"),
    ("predicted", 2, "ok", 1, "ok"),
    ("predicted", 2, "timeout", 1, "timeout"),
    ("ok", 1, "timeout", 2, "ok"),
    ("ok", 1, "crash", 2, "ok"),
    ("wrong", 1, "crash", 2, "wrong"),
    ("timeout", 1, "ok", 2, "ok"),
    ("timeout", 1, "crash", 2, "crash"),
    ("ok", 1, "wrong", 2, "wrong"),
    ("ok", 1, "compile", 2, "compile"),
    ("wrong", 1, "ok", 2, "ok"),
    ("wrong", 2, "ok", 1, "wrong"),
    ("slow", 1, "ok", 1, "ok"),
]


@pytest.mark.parametrize(("there", "day", "comes", "later", "remains"), REMAINS)
def test_which_rows_replace_others(store: Store, there: str, day: int, comes: str, later: int, remains: str) -> None:
    store.save(result(there, day=day))
    store.save(result(comes, day=later))
    assert [r.outcome for r in store.results(PLACE)] == [remains]


def test_the_newer_measurement_counts_in_any_order(store: Store) -> None:
    store.save(result(time_us=50.0, day=2))
    store.save(result(time_us=40.0, day=1))
    assert best_of(store) == result(time_us=50.0, day=2)
    store.save(result(time_us=60.0, day=2))
    assert best_of(store) == result(time_us=60.0, day=2)


# Invalid rows


@pytest.mark.parametrize(
    "damage",
    [
        'config_json = \'{"BLOCK_M": __import__("os")}\'',
        "config_json = '[]'",
        "config_json = '" + "[" * 100_000 + "'",
        "place_json = '{}'",
        "place_json = replace(place_json, 'h200', 'h300')",
        "place_json = replace(place_json, '128', '\"128\"')",
        "op = 'decode'",
        "kernel = 'a kernel'",
        "text = 7",
        "protocol = 'one'",
        "outcome = 'ok', time_us = null",
        "time_us = -1",
        "time_us = 'fast'",
        "time_us = 9e999",
        "registers = 1.5",
        "shape_json = '7'",
        "shape_json = 7",
        "place_json = 7",
        "config_json = x'00'",
        "shape_json = replace('{\"batch\": N}', 'N', '1' || hex(zeroblob(3000)))",
        "place_json = replace(place_json, '\"h200\"', '[[[]]]')",
        "time_us = 1e-320",
        "time_us = 1e308",
        "registers = 1 << 40",
        "protocol = -1",
        "gpu = '../h200', place_json = replace(place_json, '\"h200\"', '\"../h200\"')",
        "detail = hex(zeroblob(1000000))",
        "triton = char(10)",
        "detail = x'ff00'",
        "created_at = 'yesterday'",
        "created_at = '2026-01-01T00:00:00+02:00'",
        "source = cast(x'ff22' as text), place_json = cast(x'ff22' as text)",
    ],
)
def test_a_row_that_does_not_parse_is_skipped(path: Path, damage: str) -> None:
    with Store(path) as store:
        store.save(result(time_us=1.0, block_n=16))
        with sqlite3.connect(path) as connection:
            connection.execute(f"UPDATE measurements SET {damage}")
        store.save(result(time_us=2.0, block_n=32))
        assert best_of(store) == result(time_us=2.0, block_n=32)
        assert len(store.results(PLACE)) == len(store.all()) == 1
        assert store.unreadable == 1  # read three times, counted once
        store.save(result(time_us=1.0, block_n=16))
        assert best_of(store) == result(time_us=1.0, block_n=16)


# Invalid files and folders


def test_read_only(path: Path) -> None:
    with Store(path, read_only=True) as reader:
        assert best_of(reader) is None
        assert reader.all() == []
        assert not path.parent.exists()
        with pytest.raises(StoreError, match="opened read-only"):
            reader.save(result())


def test_an_empty_file_is_an_empty_database(tmp_path: Path) -> None:
    path = tmp_path / "tuning.db"
    path.touch()
    with Store(path, read_only=True) as reader:
        assert reader.all() == []
    with Store(path) as store:
        store.save(result())
        assert best_of(store)


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """A read-only folder with a read-only database, as seen by a user who is not root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        with Store(folder / "tuning.db") as store:
            store.save(result())
        (folder / "tuning.db").chmod(0o444)
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(user)
        folder.chmod(0o755)


def test_a_read_only_database(locked_folder: Path) -> None:
    with Store(locked_folder / "tuning.db", read_only=True) as reader:
        assert best_of(reader) == result()
    for name in ("tuning.db", "new.db"):
        with pytest.raises(StoreError, match=f"{name}.*PARALLAX_GEN_DB"):
            Store(locked_folder / name)


def test_an_unwritable_location(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "tuning.db", tmp_path / "file" / "sub" / "tuning.db", tmp_path):
        with pytest.raises(StoreError, match="PARALLAX_GEN_DB"):
            Store(path)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_corrupt_file(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "tuning.db"
    path.write_bytes(b"these are not the bytes you are looking for" * 100)
    with pytest.raises(StoreError, match=r"tuning.db is damaged or not a tuning database.*Move it away"):
        Store(path, read_only=read_only)


def test_a_truncated_and_overwritten_file(path: Path) -> None:
    with Store(path) as store:
        for n in range(200):
            store.save(result(block_n=n))
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with Store(path) as store:
        with pytest.raises(StoreError, match="damaged"):
            best_of(store)
        with pytest.raises(StoreError, match="damaged"):
            store.save(result())


@pytest.mark.parametrize("read_only", [False, True])
def test_another_programs_database_is_not_changed(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE results (a)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        Store(path, read_only=read_only)
    assert path.read_bytes() == before


@pytest.mark.parametrize("read_only", [False, True])
def test_a_newer_schema(path: Path, read_only: bool) -> None:
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 999")
    with pytest.raises(StoreError, match=r"has schema 999.*upgrade"):
        Store(path, read_only=read_only)


def test_data_dir() -> None:
    assert (data_dir("tuning_db") / "migrations" / "0001_results.sql").is_file()
    with pytest.raises(ParallaxGenError, match="nowhere"):
        data_dir("nowhere")


def test_the_memory_subpackage_imports_no_gpu_library() -> None:
    program = """
import sys
import parallax_gen.memory.place, parallax_gen.memory.shipped, parallax_gen.memory.store
print(sorted({"torch", "triton", "optuna", "jinja2"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True, env=CHILD_ENVIRONMENT
    )
    assert done.stdout == "[]\n"
