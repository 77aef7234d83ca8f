"""db: path, statistics, export, import, prune and check."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from pathlib import Path

import pytest
from cli_samples import OTHER_KERNEL, OTHER_TOOLCHAIN, PLACE, dkdv_record, make_record, run, run_json
from click.testing import CliRunner

from parallax_gen.cli import main
from parallax_gen.memory.result import Result
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain

ROWS = [
    make_record(250.0),
    make_record(None, "wrong", splits=1, detail="row 7 is NaN", error=float("inf")),
    make_record(90.0, "predicted", splits=4),
    make_record(260.0, evidence_changes=OTHER_TOOLCHAIN, created_at="2025-06-01T00:00:00+00:00"),
    dkdv_record(900.0),
    dkdv_record(None, "crash", stages=3, created_at="2025-06-01T00:00:00+00:00"),
]


def filled(store: Store) -> list[Result]:
    store.merge(ROWS)
    assert len(store.all()) == len(ROWS)
    return store.all()


@pytest.mark.parametrize("command", ["path", "stats", "export", "import", "prune", "check"])
def test_every_command_has_an_example(command: str) -> None:
    text = run("db", command, "--help").output
    assert "Example\n    parallax-gen db " + command in text
    assert max(map(len, text.splitlines())) <= 80
    assert "..." not in run("db", "--help").output.partition("Commands")[2]  # the summaries fit


# path


def test_path_alone_is_on_standard_output(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run("db", "path")
    assert result.stdout == f"{store.path}\n"
    assert result.stderr == f"PARALLAX_GEN_DB is {store.path}\n"
    assert run_json("db", "path") == {"path": str(store.path), "exists": True, "PARALLAX_GEN_DB": str(store.path)}
    monkeypatch.delenv("PARALLAX_GEN_DB")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    result = run("db", "path")
    assert result.stdout == f"{tmp_path}/data/parallax_gen/tuning.db\n"
    assert result.stderr == "PARALLAX_GEN_DB is not set, so this is the default; not yet created\n"
    assert not (tmp_path / "data").exists()


# stats


def test_stats_count_everything(store: Store) -> None:
    filled(store)
    result = run_json("db", "stats")
    assert (result["rows"], result["schema"], result["unreadable"]) == (6, 4, 0)
    assert result["bytes"] >= store.path.stat().st_size > 0
    assert result["kernels"] == [
        {"gpu": "h200", "op": "decode", "rows": 4, "outcomes": {"ok": 2, "wrong": 1, "predicted": 1}},
        {"gpu": "h200", "op": "dkdv", "rows": 2, "outcomes": {"ok": 1, "crash": 1}},
    ]
    toolchains = [(t["ops"], t["rows"], t["here"], t["newest"][:10]) for t in result["toolchains"]]
    assert toolchains == [(["dkdv", "decode"], 5, True, "2026-01-01"), (["decode"], 1, False, "2025-06-01")]
    here = Toolchain.here()
    assert [(t["triton"], t["cuda"]) for t in result["toolchains"]] == [(here.triton, here.cuda), ("3.4.1", "12.4")]
    assert [t["protocol"] for t in result["toolchains"]] == [1, 1]


def test_stats_count_rows_of_todays_kernels(store: Store) -> None:
    """Independent of the toolchain: another toolchain's row may be of today's kernel, and this one's not."""
    filled(store)
    store.save(make_record(240.0, splits=3, evidence_changes=OTHER_KERNEL))
    store.save(
        make_record(
            240.0, splits=3, evidence_changes=OTHER_KERNEL | OTHER_TOOLCHAIN, created_at="2025-06-01T00:00:00+00:00"
        )
    )
    result = run_json("db", "stats")["toolchains"]
    assert [(t["rows"], t["of_todays_kernels"]) for t in result] == [(6, 5), (2, 1)]


def test_stats_as_a_table(store: Store) -> None:
    filled(store)
    store.save(make_record(place=dataclasses.replace(PLACE, gpu="nvidia-h100-80gb-hbm3-mig-1g-10gb-16sm")))
    out = run("db", "stats", env={"COLUMNS": "80"}).stdout
    assert max(map(len, out.splitlines()[1:])) <= 80
    assert " ".join(out.split()).startswith(f"{store.path}: 7 rows, ")  # folded after a long path
    assert "decode     4  2 ok, 1 predicted, 1 wrong" in out
    here = f"Triton {Toolchain.here().triton}, ptxas {Toolchain.here().cuda} (this one)"
    assert here in " ".join(out.split())
    assert out.index("(this one)") < out.index("Triton 3.4.1, ptxas 12.4\n")


def test_stats_of_an_empty_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PARALLAX_GEN_DB", str(tmp_path / "none.db"))
    result = run_json("db", "stats")
    assert (result["exists"], result["rows"], result["bytes"], result["schema"]) == (False, 0, 0, 0)
    assert run("db", "stats").stdout == f"{tmp_path}/none.db: 0 rows, 0 bytes, schema 0\n"
    assert not (tmp_path / "none.db").exists()


# export and import


def test_what_is_exported_is_imported(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows, file = filled(store), tmp_path / "mine.jsonl"
    assert run("db", "export", file).stdout == f"{file}: 6 rows\n"
    assert run("db", "export", "-").stdout == file.read_text(encoding="utf-8")
    monkeypatch.setenv("PARALLAX_GEN_DB", str(tmp_path / "other.db"))
    result = run("db", "import", file)
    assert f"{tmp_path}/other.db: 6 new, 0 replaced, 0 kept\n" in result.stdout
    assert "of other kernels" not in result.stdout  # the other toolchain's is of a kernel that is rendered today
    with Store(tmp_path / "other.db", read_only=True) as other:
        assert other.all() == rows
    assert "0 new, 0 replaced, 12 kept" in run("db", "import", file, file).stdout


def test_import_counts_records_of_kernels_that_have_changed(store: Store, tmp_path: Path) -> None:
    with Store(tmp_path / "theirs.db") as other:
        other.merge(
            [
                make_record(240.0, splits=3, evidence_changes=OTHER_KERNEL),
                make_record(260.0, evidence_changes=OTHER_TOOLCHAIN),
            ]
        )
    result = run("db", "import", tmp_path / "theirs.db")
    assert "2 new" in result.stdout
    assert "1 of kernels that are no longer rendered: calls ignore them; tuning starts from them\n" in result.stdout


def test_rows_from_before_fingerprints_are_imported(store: Store, tmp_path: Path) -> None:
    """The hash of their templates identifies the kernel, which is no longer rendered."""
    row = make_record().to_dict()
    place, _ = row.pop("place"), row.pop("evidence")
    before = {"environment.templates": "255dd79780b8", "environment.triton": "3.5", "environment.protocol": 1}
    gone = before | {"environment.templates": "0" * 12, "environment.cuda": "12.8", "environment.space": 1}
    lines = [json.dumps({"key": place | environment} | row) for environment in (before, gone)]
    (tmp_path / "old.jsonl").write_text("\n".join(lines), encoding="utf-8")
    result = run("db", "import", tmp_path / "old.jsonl")
    assert "2 new" in result.stdout
    assert "2 of kernels that are no longer rendered" in result.stdout
    actual = {r.evidence.templates: (r.place, r.evidence.triton, r.evidence.cuda) for r in store.all()}
    assert actual == {"255dd79780b8": (PLACE, "3.5", ""), "0" * 12: (PLACE, "3.5", "12.8")}


def test_export_begins_with_the_newest_toolchain(store: Store) -> None:
    filled(store)
    rows = [json.loads(line) for line in run("db", "export", "-").stdout.splitlines()]
    assert rows[-1]["evidence"]["triton"] == "3.4.1"
    store.save(make_record(260.0, evidence_changes=OTHER_TOOLCHAIN, splits=8, created_at="2026-05-01T00:00:00+00:00"))
    rows = [json.loads(line) for line in run("db", "export", "-").stdout.splitlines()]
    assert [row["evidence"]["triton"] == "3.4.1" for row in rows] == [True, True] + [False] * 5


def test_export_with_filters(store: Store) -> None:
    filled(store)
    store.save(make_record(place=dataclasses.replace(PLACE, gpu="h100")))

    def exported(*options: str) -> list[tuple[str, str, str]]:
        rows = [json.loads(line) for line in run("db", "export", "-", *options).stdout.splitlines()]
        return sorted((row["place"]["gpu"], row["place"]["spec.op"], row["outcome"]) for row in rows)

    assert exported("--measured", "--gpu", "H200") == [("h200", "decode", "ok")] * 2 + [("h200", "dkdv", "ok")]
    assert exported("--op", "dkdv") == [("h200", "dkdv", "crash"), ("h200", "dkdv", "ok")]
    assert exported("--gpu", "NVIDIA H100 80GB HBM3") == [("h100", "decode", "ok")]
    assert exported("--gpu", "b200") == []
    assert run("db", "export", "-", "--gpu", "b2000").exit_code == 2


def test_export_does_not_overwrite_a_database(store: Store) -> None:
    rows = filled(store)
    result = run("db", "export", store.path)
    assert result.exit_code == 1
    assert "is a database and is not overwritten" in result.stderr
    assert store.all() == rows
    assert run("db", "export", store.path.parent / "file" / "x.jsonl").exit_code == 0  # the folder is created
    (store.path.parent / "plain").touch()
    assert "cannot write" in run("db", "export", store.path.parent / "plain" / "x.jsonl").stderr


def test_import_replaces_older_and_less_informative_rows(store: Store, tmp_path: Path) -> None:
    def later(result: Result) -> Result:
        return dataclasses.replace(result, created_at="2026-02-01T00:00:00+00:00")

    own = [
        make_record(10.0, splits=1),
        make_record(None, "crash", splits=2),
        later(make_record(10.0, splits=3)),
        make_record(10.0, splits=4),
    ]
    theirs = [
        later(make_record(20.0, splits=1)),
        make_record(20.0, splits=2),
        make_record(20.0, splits=3),
        make_record(20.0, splits=4),
    ]
    store.merge(own)
    with Store(tmp_path / "theirs.db") as other:
        other.merge(theirs)
    for _ in range(2):
        result = run("db", "import", tmp_path / "theirs.db")
        assert store.all() == sorted([own[2], own[3], theirs[0], theirs[1]], key=lambda r: (r.time_us, str(r.config)))
    assert "0 new, 0 replaced, 4 kept" in result.stdout
    with Store(tmp_path / "theirs.db", read_only=True) as other:
        assert len(other.all()) == 4  # only read


BAD = [
    "{",
    "[]",
    "7",
    "[" * 100_000,
    json.dumps(make_record().to_dict() | {"outcome": "great"}),
    json.dumps(make_record().to_dict() | {"config": {"BLOCK_N": "__import__('os')"}}),
    json.dumps({name: value for name, value in make_record().to_dict().items() if name != "place"}),
    json.dumps({name: value for name, value in make_record().to_dict().items() if name != "evidence"}),
    json.dumps(make_record(splits=7).to_dict() | {"place": PLACE.flat() | {"environment.color": "red"}}),
    json.dumps(make_record().to_dict() | {"evidence": make_record().evidence.to_dict() | {"kernel": "red"}}),
    json.dumps(make_record().to_dict() | {"evidence": make_record().evidence.to_dict() | {"color": "red"}}),
]


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:20])
def test_a_bad_line_is_named_and_nothing_is_imported(store: Store, tmp_path: Path, line: str) -> None:
    file = tmp_path / "theirs.jsonl"
    good = json.dumps(make_record().to_dict())
    file.write_text(f"{good}\n\n{line}\n", encoding="utf-8")  # empty lines are skipped
    result = run("db", "import", file)
    assert result.exit_code == 1
    assert f"{file}, line 3: not a record: " in result.stderr
    assert "error: nothing was imported: 1 of 2 are not valid results" in result.stderr
    assert store.all() == []
    result = run("db", "import", file, "--skip-bad")
    assert result.exit_code == 0
    assert "1 new, 0 replaced, 0 kept, 1 skipped" in result.stdout
    assert store.all() == [make_record()]


def test_import_from_standard_input(store: Store) -> None:
    lines = "".join(json.dumps(row.to_dict()) + "\n" for row in ROWS)
    result = CliRunner().invoke(main, ["db", "import", "-"], input=lines)
    assert "6 new" in result.stdout
    result = CliRunner().invoke(main, ["db", "import", "-"], input=b"\xff\xfe\n" * 9)
    assert "standard input, line 1: not a record" in result.stderr
    assert "and 4 more" in result.stderr


def test_import_of_a_database_with_a_bad_row(store: Store, tmp_path: Path) -> None:
    with Store(tmp_path / "theirs.db") as other:
        other.merge(ROWS[:3])
    with sqlite3.connect(tmp_path / "theirs.db") as connection:
        connection.execute("UPDATE measurements SET time_us = 'fast' WHERE outcome = 'ok'")
    result = run("db", "import", tmp_path / "theirs.db")
    assert result.exit_code == 1
    assert "theirs.db, row 1: time_us: got 'fast'" in result.stderr
    assert "2 new, 0 replaced, 0 kept, 1 skipped" in run("db", "import", "--skip-bad", tmp_path / "theirs.db").stdout
    assert len(store.all()) == 2


def test_import_of_another_programs_database(store: Store, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE results (a)")
    result = run("db", "import", tmp_path / "other.db")
    assert result.exit_code == 1
    assert "another program" in result.stderr
    assert run("db", "import", tmp_path / "missing.jsonl").exit_code == 2


# prune


def copies(store: Store) -> list[Path]:
    return sorted(store.path.parent.glob("tuning.db.pruned-*.jsonl"))


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (("--failures",), [1, 5]),
        (("--predicted",), [2]),
        (("--other-environments",), [3]),
        (("--failures", "--predicted"), [1, 2, 5]),
        (("--older-than", "1"), [0, 1, 2, 3, 4, 5]),
        (("--failures", "--op", "dkdv"), [5]),
        (("--failures", "--older-than", "36500"), []),
        (("--failures", "--gpu", "h100"), []),
    ],
)
def test_prune_deletes_selected_rows_and_keeps_a_copy(store: Store, options: tuple[str, ...], gone: list[int]) -> None:
    rows = filled(store)
    assert run("db", "prune", *options, "--dry-run").exit_code == 0
    assert (store.all(), copies(store)) == (rows, [])
    result = run("db", "prune", *options, "--yes")
    assert result.exit_code == 0, result.output
    assert store.all() == [row for row in rows if row not in [ROWS[n] for n in gone]]
    if not gone:
        assert "none of its 6 rows is selected" in result.stdout
        assert copies(store) == []
        return
    (copy,) = copies(store)
    assert f"deleted; they are in {copy}\n" in result.stdout
    assert f"{len(gone)} new" in run("db", "import", copy).stdout
    assert store.all() == rows


def test_prune_treats_rows_of_changed_kernels_as_stale(store: Store) -> None:
    rows = filled(store)
    store.save(make_record(240.0, splits=3, evidence_changes=OTHER_KERNEL))
    assert "2 of 7 rows (2 ok)" in run("db", "prune", "--other-environments", "--yes", "--dry-run").stdout
    run("db", "prune", "--other-environments", "--yes")
    assert store.all() == [row for row in rows if row != ROWS[3]]


def test_prune_asks_for_confirmation(store: Store) -> None:
    rows = filled(store)
    result = CliRunner().invoke(main, ["db", "prune", "--failures"], input="n\n")
    assert result.exit_code == 1
    assert "delete 2 of 6 rows (1 crash, 1 wrong)? [y/N]" in result.output
    assert (store.all(), copies(store)) == (rows, [])
    assert CliRunner().invoke(main, ["db", "prune", "--failures"], input="y\n").exit_code == 0
    assert len(store.all()) == 4


def test_prune_without_a_filter_is_a_usage_error(store: Store) -> None:
    for options in ((), ("--yes",), ("--gpu", "h200")):
        result = run("db", "prune", *options)
        assert result.exit_code == 2
        assert "give one or more of --other-environments" in result.stderr


def test_prune_deletes_nothing_if_the_copy_fails(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from parallax_gen.errors import StoreError
    from parallax_gen.memory import lines

    def full(*_: object) -> None:
        raise StoreError("cannot write: No space left on device")

    rows = filled(store)
    monkeypatch.setattr(lines, "write_lines", full)
    assert run("db", "prune", "--failures", "--yes").exit_code == 1
    assert store.all() == rows


def test_prune_creates_no_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PARALLAX_GEN_DB", str(tmp_path / "none.db"))
    result = run("db", "prune", "--failures")
    assert result.exit_code == 1
    assert "not yet created" in result.stderr
    assert not (tmp_path / "none.db").exists()


def test_prune_keeps_a_row_that_was_replaced_meanwhile(store: Store) -> None:
    filled(store)
    updated = dataclasses.replace(ROWS[1], outcome="ok", time_us=1.0, created_at="2026-02-01T00:00:00+00:00")
    store.save(updated)
    assert store.delete([ROWS[1], ROWS[2]]) == 1
    assert updated in store.all()


# check


def test_check_of_a_sound_database(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    filled(store)
    result = run("db", "check")
    assert (result.exit_code, result.stdout) == (0, f"{store.path}: sound, schema 4, 6 rows readable\n")
    assert run_json("db", "check")["sound"]
    monkeypatch.setenv("PARALLAX_GEN_DB", str(tmp_path / "none.db"))
    assert "not yet created" in run("db", "check").stdout


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("time_us = 'fast'", "row 1: time_us: got 'fast'"),
        ("kernel = 'abc'", "row 1: kernel: got 'abc'; allowed: 32 hex digits, or an empty text"),
        ("place_json = '{}'", "row 1: gpu: got None"),
        ("gpu = 'h100'", "row 1: gpu and op: got ('h100', 'decode'); allowed: those of the place"),
        ("config_json = '" + "[" * 100_000 + "'", "row 1: "),
        ("config_json = '[\"" + "a" * 5000 + "\"]'", "row 1: config"),
    ],
)
def test_check_names_rows_that_cannot_be_read(store: Store, damage: str, message: str) -> None:
    filled(store)
    with sqlite3.connect(store.path) as connection:
        connection.execute(f"UPDATE measurements SET {damage} WHERE rowid = 1")
    result = run("db", "check")
    assert result.exit_code == 1
    assert f"{store.path}: problems: 1, schema 4, 5 rows readable\n  {message}" in result.stdout
    assert len(result.stdout) < 500 + len(str(store.path))
    assert "1 row cannot be read" in run("db", "stats").stdout
    assert "left out 1 row that cannot be read" in run("db", "export", "-").stderr


def test_check_of_a_damaged_file(store: Store) -> None:
    for n in range(200):
        store.save(make_record(100.0 + n, splits=n + 2))
    store.close()
    content = store.path.read_bytes()
    store.path.write_bytes(content[: len(content) // 2])
    result = run("db", "check")
    assert result.exit_code == 1
    assert "problems: " in result.stdout
    actual = json.loads(run("db", "check", "--json").stdout)
    assert not actual["sound"]
    assert actual["problems"]
    store.path.write_bytes(b"not a database at all" * 1000)
    assert "is damaged or not a tuning database" in run("db", "check").stdout
