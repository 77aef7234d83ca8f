"""Fuzzed lines, rows and files: they raise the documented errors, or are read as records.

The draws are seeded, so every run is the same. PARALLAX_GEN_FUZZ multiplies their number.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from memory_samples import PLACE, SHAPE, result

from parallax_gen.describe import time_and_rate
from parallax_gen.errors import StoreError
from parallax_gen.memory.bounds import MAX_US, MIN_US
from parallax_gen.memory.gains import comparisons
from parallax_gen.memory.lines import from_line, read_file, to_line
from parallax_gen.memory.ranking import RecordTable
from parallax_gen.memory.result import Result, newest_toolchain_first
from parallax_gen.memory.shipped import Memory, load_shipped
from parallax_gen.memory.store import Store
from parallax_gen.ops.space import why_invalid
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import LARGEST_SIZE, representative
from parallax_gen.runtime.dispatch import choose

FACTOR = int(os.environ.get("PARALLAX_GEN_FUZZ", "1"))
LINES, RANKED, ROWS, DAMAGED = 600 * FACTOR, 40 * FACTOR, 300 * FACTOR, 60 * FACTOR

DEEP = json.loads("[" * 900 + "]" * 900)
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 128, 2**20, 2**31, 2**63, 2**64, 2**2000, -(2**70)),
    *(0.0, 1.5, 128.0, 1e-320, 1e-3, 1e308, -1e308, math.inf, -math.inf, math.nan),
    *("", "7", "ok", "\ud800", "\udfff\0", "h200", "../h200", "\n", "x" * 100_000, "None", "1e5"),
    *([], {}, [1], {"a": 1}, DEEP, {"a": DEEP}),
]


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


def records() -> list[Result]:
    """Records of every op: shipped ones, failed ones and predictions."""
    shipped = load_shipped("h100")
    few = [*shipped[:: len(shipped) // 10], *load_shipped("h200")[::150]]
    failed = result("wrong", shape=SHAPE, error=math.inf, detail="row 7 is NaN", registers=168)
    return [*few, failed, result("predicted", block_n=32)]


def changed(draw: random.Random, data: dict[str, Any], odd: list[Any]) -> dict[str, Any]:
    """A record's data with some fields changed, removed or renamed."""
    data = copy.deepcopy(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        inner = [part for part in data.values() if isinstance(part, dict) and part]
        of = draw.choice([data, *inner])
        name = draw.choice(list(of))
        change = draw.randrange(8)
        if change < 5:
            of[name] = draw.choice(odd)
        elif change == 5:
            of[draw.choice(("x", name.upper(), "\ud800", "spec.", f"bucket.{name}"))] = of.pop(name)
        elif change == 6:
            del of[name]
        else:
            of[name] = of[draw.choice(list(of))]  # with another type or meaning
        if not data:
            break
    return data


def damaged(draw: random.Random, text: bytes, most: int = 4) -> bytes:
    """A text or file with some bytes changed or a piece removed."""
    actual = bytearray(text)
    for _ in range(draw.randint(1, most)):
        at = draw.randrange(len(actual))
        if draw.random() < 0.7:
            actual[at] = draw.randrange(256)
        else:
            del actual[at : at + draw.choice((1, 10, len(actual)))]
        if not actual:
            break
    return bytes(actual).replace(b"\n", b" ") if text.endswith(b"}") else bytes(actual)


def lines(draw: random.Random) -> Iterator[bytes]:
    valid_records = [result.to_dict() for result in records()]
    for _ in range(LINES):
        text = json.dumps(changed(draw, draw.choice(valid_records), ODD)).encode()
        yield damaged(draw, text) if draw.random() < 0.2 else text


def check(draw: random.Random, results: list[Result]) -> None:
    """Use records in every way that the code does."""
    table = RecordTable(results)
    assert len(newest_toolchain_first(results)) == len(results)
    places = dict.fromkeys(result.place for result in results)
    for place in draw.sample(list(places), min(RANKED, len(places))):
        gpu = GPUS.get(place.gpu, GPUS["h200"])
        choice = choose(place.spec, representative(place.bucket, place.spec.group), gpu, table)
        assert why_invalid(place.spec, choice.config, gpu) is None
        comparisons(place, gpu, table.results(place))


def test_fuzzed_lines(draw: random.Random, tmp_path: Path) -> None:
    path = tmp_path / "theirs.jsonl"
    path.write_bytes(b"\n".join(lines(draw)) + b"\n")
    actual = read_file(path)
    assert len(actual.results) + len(actual.problems) == sum(
        1 for line in path.read_bytes().split(b"\n") if line.strip()
    )
    assert min(len(actual.results), len(actual.problems)) > LINES // 20  # valid and invalid lines
    for problem in actual.problems:
        problem.encode()  # it must be printable
        assert problem.startswith(f"{path}, line ")
        assert len(problem) < 500
    with Store(tmp_path / "tuning.db") as store:
        merged = store.merge(actual.results)
        kept = store.all()
        assert (len(kept), store.unreadable) == (merged.new, 0)
    assert {from_line(to_line(result).encode()) for result in actual.results} == set(actual.results)
    check(draw, kept)


def test_a_fuzzed_shipped_file(draw: random.Random, tmp_path: Path) -> None:
    path, memory, refused = tmp_path / "h100.jsonl", Memory(None, tmp_path), 0
    for number, line in enumerate(lines(draw)):
        if number % 4 == 0:
            path.write_bytes(line + b" " * (number // 4) + b"\n")  # a new size, so that the file is read again
            message = ""
            try:
                assert all(result.measured for result in memory.all())
                for place in (PLACE, dataclasses.replace(PLACE, gpu="h100")):
                    memory.results(place)
            except StoreError as error:
                message = str(error)
                refused += 1
            message.encode()
            assert not message or f"{path}, line " in message
    assert refused > LINES // 20


def rewrite(draw: random.Random, path: Path) -> None:
    """Change some columns in every row of a database; SQLite accepts any type."""
    odd = [value for value in ODD if isinstance(value, float | None) or (type(value) is int and abs(value) < 2**63)]
    odd += ["", "x", "7", "{}", "[]", "null", "[" * 100_000, "\0", "x" * 100_000, b"", b"\xff\x00", b"{}", math.inf]
    with closing(sqlite3.connect(path)) as connection, connection:
        rows = list(connection.execute("SELECT rowid, place_json, config_json, shape_json FROM measurements"))
        columns = [row[1] for row in connection.execute("PRAGMA table_info(measurements)")]
        for number, *texts in rows:
            name, value = draw.choice(columns), draw.choice(odd)
            if draw.random() < 0.5:
                at = draw.randrange(3)
                name = ("place_json", "config_json", "shape_json")[at]
                value = json.dumps(changed(draw, json.loads(texts[at]), ODD))
            with suppress(sqlite3.IntegrityError):  # values that the schema forbids
                connection.execute(f"UPDATE measurements SET {name} = ? WHERE rowid = ?", (value, number))


def test_fuzzed_rows(draw: random.Random, tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    with_shapes = [dataclasses.replace(record, shape=record.shape or SHAPE) for record in records()]
    with Store(path) as store:
        store.merge(
            dataclasses.replace(
                draw.choice(with_shapes), evidence=dataclasses.replace(with_shapes[0].evidence, triton=f"3.9.{number}")
            )
            for number in range(ROWS)
        )
    rewrite(draw, path)
    with Store(path, read_only=True) as store:
        read = store.all()
        assert min(len(read), store.unreadable) > ROWS // 20
        assert len(store.unreadable_rows()) == store.unreadable == ROWS - len(read)
        for problem in store.problems():
            problem.encode()
        assert {*store.in_trial_order()} == {*read}
        for place in {record.place for record in with_shapes}:
            store.results(place)
            store.fastest(place.gpu, place.spec.op)
    actual = read_file(path)
    assert len(actual.problems) == ROWS - len(read)
    with Store(tmp_path / "mine.db") as store:
        store.merge(actual.results)
    with Store(path) as store:  # no old row is lost
        assert len(store.unreadable_rows()) == ROWS - len(read)
    check(draw, read)


def test_a_database_file_with_changed_bytes(draw: random.Random, tmp_path: Path) -> None:
    with Store(tmp_path / "sound.db") as store:
        store.merge(result(block_n=number) for number in range(40))
        store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    sound, messages = (tmp_path / "sound.db").read_bytes(), []
    for number in range(DAMAGED):
        path = tmp_path / f"{number}.db"
        path.write_bytes(damaged(draw, sound, most=100))
        for read_only in (True, False):
            try:
                with Store(path, read_only=read_only) as store:
                    store.results(PLACE)
                    store.unreadable_rows()
                    store.problems()
                    if not read_only:
                        store.save(result(block_n=7, day=2))
            except StoreError as error:
                messages.append(str(error))
    assert messages
    assert all(str(tmp_path) in problem for problem in messages)


def test_the_largest_allowed_sizes_work() -> None:
    """At the bounds all derived values are finite, and a config is chosen."""
    for record in records():
        largest = {f.name: LARGEST_SIZE for f in dataclasses.fields(record.place.bucket)}
        place = dataclasses.replace(record.place, bucket=dataclasses.replace(record.place.bucket, **largest))
        shape = representative(place.bucket, place.spec.group)
        sizes = dataclasses.replace(shape, batch=LARGEST_SIZE, heads=LARGEST_SIZE, kv_heads=LARGEST_SIZE)
        check(random.Random(0), [dataclasses.replace(record, place=place, shape=sizes)])
        for time_us in (MIN_US, MAX_US):
            assert "us, " in time_and_rate(place.spec, sizes, time_us)
