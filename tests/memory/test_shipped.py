"""The shipped files of records, and their merge with the user's records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_samples import OTHER_BUCKET, OTHER_GPU, OTHER_KERNEL, OTHER_TRITON, PLACE, SHAPE, best_of, config, result

from parallax_gen.errors import ArgumentError, StoreError
from parallax_gen.files import data_dir
from parallax_gen.memory.result import reading_order
from parallax_gen.memory.shipped import Memory, load_shipped, write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.ops.space import why_invalid
from parallax_gen.problem.hardware import GPUS


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "tuning.db") as store:
        yield store


# The files


def test_written_records_are_read_in_order(tmp_path: Path) -> None:
    fast, slow = result(time_us=12.5, shape=SHAPE, error=1e-3, source="shipped"), result(time_us=20.0, block_n=32)
    other = result(place=OTHER_BUCKET, time_us=5.0)
    path = write_shipped([other, slow, fast], "h200", tmp_path)
    assert path == tmp_path / "h200.jsonl"
    assert load_shipped("h200", tmp_path) == [fast, slow, other]  # 4096 before 8192, then by time
    assert load_shipped("h100", tmp_path) == []
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert first["place"] == PLACE.flat()
    assert first["config"]["BLOCK_M"] == 128
    assert [p.name for p in tmp_path.iterdir()] == ["h200.jsonl"]


def test_the_fastest_measured_records_are_kept(tmp_path: Path) -> None:
    results = [result(time_us=10.0 + n, block_n=n) for n in range(6)]
    write_shipped([*results, result("predicted", 1.0, block_n=7), result("crash", block_n=8)], "h200", tmp_path)
    assert load_shipped("h200", tmp_path) == results[:3]
    write_shipped([], "h200", tmp_path, keep=1)
    assert load_shipped("h200", tmp_path) == results[:1]


def test_records_that_would_otherwise_be_lost_are_kept(tmp_path: Path) -> None:
    """Those of another toolchain, and those that `also_keep` and `group` select."""
    results = [result(time_us=10.0 + n, block_n=n) for n in range(4)]
    others = [result(time_us=20.0, evidence=OTHER_TRITON), result(time_us=30.0, evidence=OTHER_KERNEL)]
    write_shipped([*results, *others], "h200", tmp_path, keep=1)
    assert load_shipped("h200", tmp_path) == [results[0], others[0]]
    write_shipped(results, "h200", tmp_path, keep=1, also_keep=lambda r: r.config == results[3].config)
    assert load_shipped("h200", tmp_path) == [results[0], results[3], others[0]]
    write_shipped(others, "h200", tmp_path, keep=1, group=lambda r: r.evidence.kernel)
    assert load_shipped("h200", tmp_path) == [results[0], others[1]]


def test_merging_keeps_usable_records(tmp_path: Path) -> None:
    write_shipped([result(time_us=10.0, day=2), result(time_us=11.0, day=2, block_n=32)], "h200", tmp_path)
    write_shipped([result(time_us=9.0, day=1), result("wrong", day=3, block_n=32)], "h200", tmp_path)
    assert load_shipped("h200", tmp_path) == [result(time_us=10.0, day=2)]
    write_shipped([result("timeout", day=4)], "h200", tmp_path)
    assert load_shipped("h200", tmp_path) == [result(time_us=10.0, day=2)]


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    results = [result(time_us=100 / 3 + n * 1e-7, block_n=n) for n in (2, 1, 3)]
    path = write_shipped(results, "h200", tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "33.3333," in text
    write_shipped(results[::-1], "h200", tmp_path)
    assert path.read_text(encoding="utf-8") == text


def test_results_of_another_gpu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="h100"):
        write_shipped([result(place=OTHER_GPU)], "h200", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "<<<<<<< HEAD",
        "[" * 100_000,
        '"\\ud800"',
        json.dumps(result().to_dict() | {"color": "blue"}),
        json.dumps(result().to_dict() | {"time_us": 10**400, "config": None}),
        json.dumps(result().to_dict() | {"time_us": 1e-320}),
        json.dumps(result().to_dict() | {"source": "\ud800"}),
        json.dumps(result(place=OTHER_GPU).to_dict()),
        json.dumps(result("predicted").to_dict()),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = write_shipped([result()], "h200", tmp_path)
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(StoreError, match=r"h200\.jsonl, line 2"):
        load_shipped("h200", tmp_path)
    if '"gpu": "h100"' not in line:  # a call reads the lines of its place, and lines without a place
        with pytest.raises(StoreError, match=r"h200\.jsonl, line 2"):
            best_of(Memory(None, tmp_path))


def test_an_unusable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot (read|write).*h200\.jsonl"):
        write_shipped([result()], "h200", tmp_path / "file")


def test_the_shipped_files_are_valid() -> None:
    for path in data_dir("tuning_db").glob("*.jsonl"):
        assert load_shipped(path.stem)


# Merged with the user's records


def test_the_fastest_record_counts_with_the_users_time_of_a_config(store: Store, tmp_path: Path) -> None:
    memory = Memory(store, tmp_path)
    assert best_of(memory) is None
    shipped = result(time_us=10.0, source="shipped")
    write_shipped([shipped], "h200", tmp_path)
    assert best_of(memory) == best_of(Memory(None, tmp_path)) == shipped
    own = result(time_us=12.0, block_n=32, source="here")
    store.save(own)
    assert best_of(memory) == shipped  # a slow trial of the user does not hide shipped records
    assert memory.results(PLACE) == [shipped, own]
    retimed = result(time_us=13.0, source="here")
    store.save(retimed)
    assert best_of(memory) == own
    assert memory.results(PLACE) == [own, retimed]


@pytest.mark.parametrize(("outcome", "hides"), [("wrong", True), ("crash", True), ("predicted", False)])
def test_a_users_result_hides_the_shipped_record(store: Store, tmp_path: Path, outcome: str, hides: bool) -> None:
    first, second = result(time_us=10.0), result(time_us=11.0, block_n=32)
    write_shipped([first, second], "h200", tmp_path)
    own = result(outcome)
    store.save(own)
    memory = Memory(store, tmp_path)
    assert best_of(memory) == (second if hides else first)
    assert memory.results(PLACE) == ([second, own] if hides else [first, second])
    assert memory.all() == memory.results(PLACE)


def test_all_merges_both(store: Store, tmp_path: Path) -> None:
    memory = Memory(store, tmp_path)
    store.save(result(place=OTHER_BUCKET))
    write_shipped([result(evidence=OTHER_TRITON)], "h200", tmp_path)
    write_shipped([result(place=OTHER_GPU)], "h100", tmp_path)
    assert memory.all() == [result(place=OTHER_GPU), result(evidence=OTHER_TRITON), result(place=OTHER_BUCKET)]
    assert memory.all(gpu="h100") == [result(place=OTHER_GPU)]
    assert memory.all(op="decode") == []


# The real shipped files


@pytest.mark.parametrize("path", sorted(data_dir("tuning_db").glob("*.jsonl")), ids=lambda path: path.stem)
def test_shipped_records_are_sorted_measured_and_valid(path: Path) -> None:
    rows = load_shipped(path.stem)
    assert rows
    assert rows == sorted(rows, key=reading_order)
    assert len({row.identity for row in rows}) == len(rows)
    for row in rows:
        assert row.measured
        assert row.error is not None
        assert row.error < 1e-2
        assert why_invalid(row.place.spec, row.config, GPUS[path.stem]) is None


def test_shipped_records_keep_their_trial_numbers(tmp_path: Path) -> None:
    write_shipped([result(trial=5), result(block_n=32)], "h200", tmp_path)
    assert {r.config: r.trial for r in load_shipped("h200", tmp_path)} == {config(64): 5, config(32): None}
    assert '"trial": 5}' in (tmp_path / "h200.jsonl").read_text(encoding="utf-8")
