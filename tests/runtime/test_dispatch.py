"""Which config a call gets: a record under its key, else the default; and nothing from elsewhere."""

from __future__ import annotations

import sqlite3
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from parallax_gen.codegen.render import templates_hash
from parallax_gen.memory import keys
from parallax_gen.memory.keys import Key
from parallax_gen.memory.results import Result
from parallax_gen.memory.shipped import Memory, write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.problem.config import DecodeConfig
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.heuristics import default_config
from parallax_gen.problem.shapes import Shape, bucket_of, representative
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import Dispatcher, RuntimeMemory, choose, records_here

GPU = gpu_by_name("h200")
SPEC = KernelSpec("decode", 128, "bf16", group=4)
SHAPE = Shape(2, 32, 8, 1, 5000)
KEY = Key.here("h200", SPEC, bucket_of(SHAPE), templates_hash(SPEC))
CONFIG = DecodeConfig(BLOCK_N=64, BLOCK_H=8, NUM_SPLITS=24, merge="kernel", num_warps=2, num_stages=3)
DEFAULT = default_config(SPEC, representative(bucket_of(SHAPE), 4), GPU)


def known(**changes: object) -> Result:
    return replace(Result(KEY, CONFIG, "ok", time_us=10.0), **changes)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "tuning.db")


def test_nothing_known_gives_the_default(tmp_path: Path) -> None:
    choice = choose(SPEC, SHAPE, GPU, Memory(None, tmp_path))
    assert (choice.config, choice.record, choice.key) == (DEFAULT, None, KEY)
    assert DEFAULT != CONFIG


def test_a_record_of_the_bucket_is_used_for_every_shape_in_it(store: Store, tmp_path: Path) -> None:
    store.record(known())
    memory = Memory(store, tmp_path)
    for seqlen in (2900, 4096, 5792):
        assert choose(SPEC, replace(SHAPE, seqlen_kv=seqlen), GPU, memory).config == CONFIG
    assert choose(SPEC, replace(SHAPE, seqlen_kv=5800), GPU, memory).record is None


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, gpu="h100"),
        replace(KEY, spec=replace(SPEC, ragged=True)),
        replace(KEY, environment=replace(KEY.environment, triton="2.0")),
        replace(KEY, environment=replace(KEY.environment, templates="0" * 12)),
        replace(KEY, environment=replace(KEY.environment, protocol=0)),
        replace(KEY, environment=replace(KEY.environment, cuda="11.0")),
        replace(KEY, environment=replace(KEY.environment, cuda="")),  # from before it was recorded
        replace(KEY, environment=replace(KEY.environment, space=0)),
    ],
)
def test_a_record_of_anything_else_is_not(store: Store, tmp_path: Path, other: Key) -> None:
    store.record(known(key=other))
    assert choose(SPEC, SHAPE, GPU, Memory(store, tmp_path)).record is None


@pytest.mark.parametrize("outcome", ["predicted", "wrong", "slow", "crash"])
def test_only_what_was_measured_counts(store: Store, tmp_path: Path, outcome: str) -> None:
    store.record(known(outcome=outcome))
    assert choose(SPEC, SHAPE, GPU, Memory(store, tmp_path)).record is None


def test_a_shipped_record_is_used(tmp_path: Path) -> None:
    write_shipped([known()], "h200", tmp_path)
    assert choose(SPEC, SHAPE, GPU, Memory(None, tmp_path)).config == CONFIG


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_what_ships_is_used_with_the_triton_that_it_was_measured_with(
    monkeypatch: pytest.MonkeyPatch, gpu: str
) -> None:
    """Triton 3.6 and the assemblers in its wheel, ptxas 12.8 and ptxas-blackwell 12.9, whatever is installed here."""
    monkeypatch.setattr(keys, "triton_version", lambda: "3.6")
    monkeypatch.setattr(keys, "cuda_version", lambda: "12.8/12.9")
    memory = Memory(None)
    records = [r for r in memory.all(gpu) if r.key.environment.templates == templates_hash(r.key.spec)]
    assert records
    for record in records:
        shape = representative(record.key.bucket, record.key.spec.group)
        choice = choose(record.key.spec, shape, gpu_by_name(gpu), memory)
        assert choice.key == record.key
        assert choice.record is not None


def test_a_record_that_the_space_no_longer_holds_is_passed_over(store: Store, tmp_path: Path) -> None:
    store.record(known(config=replace(CONFIG, num_warps=32)))
    assert choose(SPEC, SHAPE, GPU, Memory(store, tmp_path)).config == DEFAULT


def test_memory_is_asked_once_a_bucket(tmp_path: Path) -> None:
    class Counting(Memory):
        asked = 0

        def best(self, key: Key) -> Result | None:
            self.asked += 1
            return super().best(key)

    memory = Counting(None, tmp_path)
    dispatcher = Dispatcher(memory)
    first = dispatcher.kernel(SPEC, SHAPE, GPU)
    again = dispatcher.kernel(SPEC, replace(SHAPE, seqlen_kv=4097), GPU)
    assert first == again
    assert memory.asked == 1
    assert callable(first[1].launch)


# A user's database that cannot be used


def unusable(path: Path, how: str) -> None:
    if how == "corrupt":
        path.write_bytes(b"these are not the bytes you are looking for" * 100)
    elif how == "foreign":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE results (a)")
    elif how == "newer":
        Store(path).close()
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 999")
    else:
        path.mkdir()


@pytest.mark.parametrize("how", ["corrupt", "foreign", "newer", "a folder"])
def test_one_that_cannot_be_opened_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    path = tmp_path / "mine.db"
    monkeypatch.setenv("PARALLAX_GEN_DB", str(path))
    unusable(path, how)
    sent = known()  # once: it bears the second in which it was made
    write_shipped([sent], "h200", tmp_path)
    with pytest.warns(UserWarning, match=r"mine\.db.* Only shipped records and defaults are used\.$"):
        memory = RuntimeMemory(tmp_path)
    assert Dispatcher(memory).kernel(SPEC, SHAPE, GPU)[0].config == CONFIG
    assert records_here(memory, "h200") == [sent]


def test_one_that_is_damaged_later_is_passed_over_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.db"
    monkeypatch.setenv("PARALLAX_GEN_DB", str(path))
    with Store(path) as store:
        store.merge(known(config=replace(CONFIG, NUM_SPLITS=n)) for n in range(1, 200))
    sent = known()
    write_shipped([sent], "h200", tmp_path)
    memory = RuntimeMemory(tmp_path)
    dispatcher = Dispatcher(memory)
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with pytest.warns(UserWarning, match=r"mine\.db is damaged.* Only shipped records and defaults are used\.$"):
        assert dispatcher.kernel(SPEC, SHAPE, GPU)[0].config == CONFIG
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatcher.kernel(SPEC, replace(SHAPE, batch=64), GPU)[0].record is None
        assert memory.all() == [sent]


def test_a_missing_one_and_a_home_that_cannot_be_written_are_no_reason_to_warn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none.db", Path("/proc/none/tuning.db"), tmp_path / "file" / "tuning.db"):
        monkeypatch.setenv("PARALLAX_GEN_DB", str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose(SPEC, SHAPE, GPU, RuntimeMemory(tmp_path)).config == DEFAULT


def test_records_that_count_here_are_the_best_of_their_keys(tmp_path: Path) -> None:
    other_triton = replace(KEY, environment=replace(KEY.environment, triton="2.0"))
    longer = replace(KEY, bucket=bucket_of(replace(SHAPE, seqlen_kv=16384)))
    slower = replace(CONFIG, NUM_SPLITS=12)
    rows = [known(), known(config=slower, time_us=11.0), known(key=other_triton), known(key=longer)]
    write_shipped(rows, "h200", tmp_path)
    with Store(tmp_path / "mine.db") as store:
        store.merge(
            [known(config=replace(CONFIG, NUM_SPLITS=48), outcome="wrong"), known(key=replace(KEY, gpu="h100"))]
        )
        assert records_here(Memory(store, tmp_path), "h200") == [known(), known(key=longer)]
