"""Untrusted records: no command ends in a traceback because of them, and none accepts impossible values."""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cli_samples import CALL, PLACE, SPEC, config, dkdv_record, evidence, make_record, run, run_json

from parallax_gen.cli import doctor
from parallax_gen.codegen.fingerprint import fingerprint
from parallax_gen.codegen.render import render
from parallax_gen.memory.bounds import LONGEST_DETAIL, LONGEST_LINE, MAX_INT, MAX_US, MIN_US
from parallax_gen.memory.old import MAX_IN_RECORDS
from parallax_gen.memory.store import Store
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import LARGEST_SIZE, Bucket, Shape
from parallax_gen.problem.spec import KernelSpec

DEEP = json.loads("[" * 900 + "]" * 900)
NONSENSE: list[dict[str, Any]] = [
    {"shape": {"batch": 2**2000, "heads": 32, "kv_heads": 8, "seqlen_q": 1, "seqlen_kv": 8192}},
    *({"time_us": value} for value in (1e-320, 1e308, math.nan, math.inf, -1.0, True, 10**400)),
    {"registers": 2**64},
    {"detail": "\ud800"},
    {"source": "\ud800"},
    {"place": PLACE.flat() | {"gpu": "\ud800"}},
    {"place": PLACE.flat() | {"bucket.kv_rows": 2**2000}},
    {"evidence": DEEP},
    {"detail": DEEP},
]
COMMANDS = (
    ("list",),
    ("list", "--all"),
    ("list", "--json"),
    ("show", *CALL),
    ("explain", *CALL),
    ("explain", *CALL, "--json"),
    ("db", "stats"),
    ("db", "export", "-"),
    ("doctor",),
)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the checks of doctor that compile."""
    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in ("database", "records")})


def every_command(folder: Path) -> None:
    files = ("export", *CALL, "-o", folder / "kernels"), ("report", "--out", folder / "report.html")
    for command in (*COMMANDS, *files, ("replay", "--borrow")):
        done = run(*command)
        assert done.exception is None, (command, done.output)


@pytest.mark.parametrize("wrong", NONSENSE, ids=lambda wrong: next(iter(wrong)))
def test_an_impossible_line_is_reported_and_not_imported(wrong: dict[str, Any], store: Store, tmp_path: Path) -> None:
    file = tmp_path / "theirs.jsonl"
    good = make_record().to_dict()
    file.write_text("\n".join(json.dumps(line) for line in (good, good | wrong)), encoding="utf-8")
    done = run("db", "import", file)
    assert (done.exit_code, store.all()) == (1, [])
    first, second = done.stderr.splitlines()
    assert first.startswith(f"{file}, line 2: not a record: ")
    assert second == "error: nothing was imported: 1 of 2 are not valid results; --skip-bad skips them"
    assert "1 new, 0 replaced, 0 kept, 1 skipped" in run("db", "import", "--skip-bad", file).stdout
    assert store.all() == [make_record()]
    assert run("replay", "--borrow", file).stderr.startswith(f"error: {file}, line 2: not a record: ")


def test_values_at_the_bounds_are_read_by_every_command(store: Store, tmp_path: Path) -> None:
    """For an unknown card, kernel and sizes, and for the ones that calls look up."""
    ints = dict.fromkeys(("registers", "spills", "shared_bytes"), MAX_INT)
    texts = {"detail": "\n\x1b[31m" + "CUDA " * (LONGEST_DETAIL // 6), "source": "x" * LONGEST_LINE}
    paged = KernelSpec("decode_varlen", 256, "bf16", **MAX_IN_RECORDS)
    sizes = Bucket(LARGEST_SIZE, LARGEST_SIZE, LARGEST_SIZE)
    strange = DecodeConfig(2**31 - 1, 0, 7, "x" * 64, 0, 2**31 - 1)
    rows = [
        make_record(
            MIN_US,
            shape=Shape(LARGEST_SIZE, LARGEST_SIZE, LARGEST_SIZE, LARGEST_SIZE, LARGEST_SIZE),
            error=1e308,
            compile_s=1e9,
        ),
        make_record(MAX_US, splits=4, time_us_p20=MAX_US, time_us_p80=MIN_US, **ints, **texts),
        make_record(None, "crash", splits=6, **ints, **texts),
        make_record(1.0, "predicted", splits=8, created_at="9999-12-31T23:59:59+00:00"),
        dkdv_record(MIN_US, created_at="0001-01-01T00:00:00+00:00"),
    ]
    rows += [make_record(time, place=place(gpu, paged, sizes)) for gpu in ("h200", "nobodys") for time in (1.0,)]
    rows += [
        make_record(1.0, place=PLACE, config=strange),
        make_record(1.0, place=place("nobodys", SPEC, PLACE.bucket)),
    ]
    file = tmp_path / "theirs.jsonl"
    file.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows), encoding="utf-8")
    assert f"{len(rows)} new" in run("db", "import", file).stdout
    every_command(tmp_path)


def place(gpu: str, spec: KernelSpec, bucket: Bucket) -> Any:
    return type(PLACE)(gpu, spec, bucket)


def test_impossible_rows_are_skipped_by_every_command(store: Store, tmp_path: Path) -> None:
    changes = [
        "time_us = 1e-320",
        "registers = 1 << 40",
        "detail = x'ff'",
        "place_json = 7",
        "config_json = '[[]]'",
        "shape_json = '{\"batch\": 1e999}'",
        "created_at = 'now'",
    ]
    store.merge(make_record(10.0, evidence_changes={"triton": f"9.{number}"}) for number in range(len(changes)))
    store.merge([make_record(250.0), make_record(260.0, splits=4)])
    with closing(sqlite3.connect(store.path)) as connection, connection:
        for number, change in enumerate(changes):
            connection.execute(f"UPDATE measurements SET {change} WHERE triton = '9.{number}'")
    every_command(tmp_path)
    assert (len(store.all()), len(store.unreadable_rows())) == (2, len(changes))
    assert run_json("explain", *CALL)["record"]["time_us"] == 250.0


def test_the_fingerprint_in_a_header_is_computed_from_the_program(store: Store, tmp_path: Path) -> None:
    """It is not taken from a record with the program's text and another program's fingerprint."""
    false = make_record(1.0, splits=3, evidence_changes={"kernel": "f" * 32})
    assert evidence(PLACE, config(3)).text == false.evidence.text
    store.save(false)
    render.cache_clear()
    assert run("export", *CALL, "-o", tmp_path).exit_code == 0
    (file,) = tmp_path.glob("decode*.py")
    text = file.read_text(encoding="utf-8")
    assert text == render(SPEC, config(3), GPUS["h200"]).text
    assert f"kernel {fingerprint(text)[:12]}" in text
    assert "f" * 12 not in text
