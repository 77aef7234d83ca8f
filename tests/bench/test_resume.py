"""`bench --csv`: known rows are not timed again, no row is lost, and each row says how it was measured."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_samples import run, run_json

from parallax_gen.bench import compare as comparing
from parallax_gen.bench.baselines import BASELINES, BATCH_INVARIANT, OURS
from parallax_gen.bench.cases import QUICK_SHAPES, bytes_needed, cases_of, quick_cases
from parallax_gen.bench.results_csv import COLUMNS, ResultsCsv
from parallax_gen.bench.rows import (
    FULL_EFFORT,
    GRID_EFFORT,
    QUICK_EFFORT,
    Conditions,
    Effort,
    Row,
    from_flat,
    to_flat,
)
from parallax_gen.errors import ParallaxGenError
from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import NO_FLAGS, TRAINING, Flags, Sizes

H200 = gpu_by_name("h200")
CONDITIONS = Conditions("h200", "NVIDIA H200", "0.1.0", "2.11.0", "3.6.0", "13.0", GRID_EFFORT, "parallax-gen bench")
ROW = Row(
    "fla",
    TRAINING,
    "backward",
    KernelSpec("forward", 96, "bf16", group=4, causal=True, stats=True, window=True),
    Shape(1, 32, 8, 4096, 4096, 512),
    1 / 3,
    2.5,
    3e-3,
    'a note, with "quotes"',
    0.3,
    0.4,
    4,
    "fla-core 0.6.0",
    CONDITIONS,
)
PAGED = KernelSpec("decode_varlen", 64, "fp16", 2, page_size=16, cache_dtype="e4m3", leftpad=True)
FAILED = Row(
    "SDPA flash", "decode", "decode", PAGED, Shape(2, 4, 2, 1, 99), note="not supported: x", conditions=CONDITIONS
)
RAGGED = dataclasses.replace(FAILED, lengths=(99, 3), time_us=7.0, peaked_error=2e-3)

DECODE = ("bench", "--op", "decode")
SHAPES = ("--shape", "1,8,1024", "--shape", "2,8,1024")


class FakeTimer:
    """Replaces the timing: records each comparison, and every one takes 10 us."""

    def __init__(self) -> None:
        self.compared: list[tuple[str, Shape, str]] = []
        self.efforts: list[Effort] = []
        self.on_compare: Callable[[], None] = lambda: None

    def compare(
        self, op: str, spec: KernelSpec, shape: Shape, only: tuple[str, ...], effort: Effort, lengths: tuple[int, ...]
    ) -> list[Row]:
        self.on_compare()
        self.compared += [(op, shape, name) for name in only]
        self.efforts.append(effort)
        parts = ("forward", "backward", "step") if op == TRAINING else (op,)
        return [Row(name, op, part, spec, shape, 10.0, 1.0, lengths=lengths) for name in only for part in parts]


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> FakeTimer:
    timer = FakeTimer()
    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: H200)
    monkeypatch.setattr(comparing, "compare", timer.compare)
    return timer


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# a row as text


@pytest.mark.parametrize("row", [ROW, FAILED, RAGGED], ids=["training", "decode", "lengths"])
def test_a_row_round_trips_through_csv(row: Row) -> None:
    texts = {name: "" if value is None else str(value) for name, value in to_flat(row).items()}
    assert from_flat(texts) == row
    assert from_flat(texts).conditions.command == "parallax-gen bench"  # type: ignore[union-attr]


def test_a_row_has_card_versions_and_command(timer: FakeTimer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["parallax-gen", "bench", "--csv", "my rows"])
    run(*DECODE, *SHAPES, "--csv", tmp_path / "rows")
    lines = lines_of(tmp_path / "rows")
    assert len(lines) == 2 * 10
    for line in lines:
        assert line["card"] == H200.title
        assert all(line[name] for name in ("gpu", "parallax_gen", "torch", "triton", "cuda"))
        assert line["command"] == "parallax-gen bench --csv 'my rows'"
        assert (line["rounds"], line["timed_ms"], line["oracle"], line["quick"]) == ("3", "60.0", "whole", "False")
    assert lines[0]["package"].startswith("kernels ")
    document = run_json(*DECODE, *SHAPES)
    assert document["card"] == H200.title
    assert all(row["command"] == document["command"] and row["torch"] for row in document["rows"])


@pytest.mark.parametrize(
    "wrong",
    [
        *({"time_us": text} for text in ("1e-320", "1e308", "inf", "nan", "-1.0")),
        {"p80_us": "1e-320"},
        {"rate": "inf"},
        {"batch": str(2**70)},
        {"batch": "9" * 5000},
        {"lengths": "99999999999x128"},
        {"lengths": f"2x{2**70}"},
    ],
)
def test_an_impossible_row_is_ignored(wrong: dict[str, str], tmp_path: Path) -> None:
    """The file may have been edited by hand: a row that cannot have been measured is timed again."""
    path = tmp_path / "rows"
    ResultsCsv(path).add([RAGGED, ROW])
    lines = lines_of(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([lines[0] | wrong, lines[1]])
    assert (ResultsCsv(path).stored(RAGGED), ResultsCsv(path).stored(ROW)) == (None, ROW)


# resuming


def test_known_rows_are_not_timed_again(timer: FakeTimer, tmp_path: Path) -> None:
    first = run(*DECODE, *SHAPES, "--csv", tmp_path / "rows", "--only", "fla")
    assert [(shape.batch, name) for _, shape, name in timer.compared] == [(1, "fla"), (2, "fla")]
    timer.compared.clear()
    second = run(*DECODE, *SHAPES, "--csv", tmp_path / "rows", "--only", "fla")
    assert timer.compared == []
    assert second.stdout == first.stdout
    run(*DECODE, "--shape", "1,8,1024", "--csv", tmp_path / "rows", "--only", "fla", "--only", "SDPA flash")
    assert [name for _, _, name in timer.compared] == ["SDPA flash"]
    assert len(lines_of(tmp_path / "rows")) == 3


def test_an_interrupted_run_resumes(timer: FakeTimer, tmp_path: Path) -> None:
    def interrupt_at_the_second() -> None:
        if timer.compared:
            raise KeyboardInterrupt

    timer.on_compare = interrupt_at_the_second
    stopped = run(*DECODE, *SHAPES, "--csv", tmp_path / "rows")
    assert stopped.exit_code == 130
    assert stopped.stderr == (
        f"stopped: the timed rows are in {tmp_path / 'rows'}; the same command continues from there\n"
    )
    assert {line["batch"] for line in lines_of(tmp_path / "rows")} == {"1"}
    timer.on_compare = lambda: None
    timer.compared.clear()
    assert run(*DECODE, *SHAPES, "--csv", tmp_path / "rows").exit_code == 0
    assert {shape.batch for _, shape, _ in timer.compared} == {2}
    assert {line["batch"] for line in lines_of(tmp_path / "rows")} == {"1", "2"}


@pytest.mark.parametrize("changed", ["card", "torch", "effort", "package"])
def test_rows_of_other_cards_versions_and_settings_are_kept(changed: str, tmp_path: Path) -> None:
    results = ResultsCsv(tmp_path / "rows")
    results.add([ROW])
    if changed == "package":
        other = dataclasses.replace(ROW, package="fla-core 0.7.0")
    else:
        value = QUICK_EFFORT if changed == "effort" else "other"
        other = dataclasses.replace(ROW, conditions=dataclasses.replace(CONDITIONS, **{changed: value}))
    assert ResultsCsv(tmp_path / "rows").stored(ROW) == ROW
    assert ResultsCsv(tmp_path / "rows").stored(other) is None
    results.add([other])
    read = ResultsCsv(tmp_path / "rows")
    assert (read.stored(ROW), read.stored(other)) == (ROW, other)


def test_rows_of_another_command_are_reused(tmp_path: Path) -> None:
    ResultsCsv(tmp_path / "rows").add([ROW])
    requested = dataclasses.replace(ROW, time_us=None, conditions=dataclasses.replace(CONDITIONS, command="another"))
    assert ResultsCsv(tmp_path / "rows").stored(requested) == ROW


def test_after_tuning_ours_is_timed_again(timer: FakeTimer, tmp_path: Path, store: Store) -> None:
    from cli_samples import SHAPE, make_record

    ours = (*DECODE, "--shape", SHAPE, "--csv", tmp_path / "rows", "--only", "parallax_gen")
    run(*ours)
    run(*ours)
    assert len(timer.compared) == 1
    store.save(make_record(200.0, splits=3))
    run(*ours)
    assert len(timer.compared) == 2


@pytest.mark.parametrize("lost", [2, 30, 60, 400])
def test_a_truncated_line_loses_no_other_row(lost: int, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    quoted = dataclasses.replace(FAILED, conditions=dataclasses.replace(CONDITIONS, command='bench --csv "a, b"'))
    ResultsCsv(path).add([ROW, quoted])
    path.write_text(path.read_text(encoding="utf-8")[:-lost], encoding="utf-8")
    read = ResultsCsv(path)
    assert (read.stored(ROW), read.stored(FAILED)) == (None if lost == 400 else ROW, None)
    read.add([FAILED])
    reread = ResultsCsv(path)
    assert (reread.stored(ROW), reread.stored(FAILED)) == (read.stored(ROW), FAILED)


def test_a_last_line_without_a_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    ResultsCsv(path).add([ROW])
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    ResultsCsv(path).add([FAILED])
    assert (ResultsCsv(path).stored(ROW), ResultsCsv(path).stored(FAILED)) == (ROW, FAILED)
    path.write_text(",".join(COLUMNS), encoding="utf-8")
    ResultsCsv(path).add([ROW])
    assert ResultsCsv(path).stored(ROW) == ROW


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "no table at all", ",".join(COLUMNS[:-1]) + "\n"])
def test_a_file_of_another_format_is_not_changed(timer: FakeTimer, text: str, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text(text, encoding="utf-8")
    done = run(*DECODE, "--csv", tmp_path / "rows")
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "does not have the columns of parallax-gen bench: choose another file" in done.stderr
    assert (tmp_path / "rows").read_text(encoding="utf-8") == text
    assert timer.compared == []


def remove_columns(path: Path, *names: str) -> None:
    """Remove columns, as in older files."""
    lines = lines_of(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, [c for c in COLUMNS if c not in names], extrasaction="ignore", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(lines)


@pytest.mark.parametrize("missing", [("lengths", "peaked_error"), ("peaked_error",)], ids=str)
@pytest.mark.parametrize("lost", [0, 1, 3, 30])
def test_an_older_file_is_extended_and_gets_the_columns_that_it_lacks(
    lost: int, missing: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "rows"
    ResultsCsv(path).add([ROW, FAILED])
    remove_columns(path, *missing)
    path.write_text(path.read_text(encoding="utf-8")[: -lost or None], encoding="utf-8")
    read, whole = ResultsCsv(path), lost <= 1
    assert (read.stored(ROW), read.stored(FAILED), read.stored(RAGGED)) == (ROW, FAILED if whole else None, None)
    read.add([RAGGED])
    reread = ResultsCsv(path)
    assert (reread.stored(ROW), reread.stored(FAILED), reread.stored(RAGGED)) == (
        ROW,
        FAILED if whole else None,
        RAGGED,
    )
    assert [line["lengths"] for line in lines_of(path)] == ["", *[""] * whole, "99,3"]
    assert [line["peaked_error"] for line in lines_of(path)] == ["", *[""] * whole, "0.002"]
    assert all(line["quick"] == "False" for line in lines_of(path))
    assert not list(tmp_path.glob(".rows*"))


def test_an_unwritable_file_is_an_error_before_anything_is_timed(timer: FakeTimer, tmp_path: Path) -> None:
    done = run(*DECODE, "--csv", tmp_path / "no folder" / "rows")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: --csv: ")
    assert done.stderr.count("\n") == 1
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    assert run(*DECODE, "--csv", tmp_path / "bytes").exit_code == 1
    assert timer.compared == []


def test_without_csv_nothing_is_stored() -> None:
    results = ResultsCsv()
    results.add([ROW])
    assert results.stored(ROW) == ROW


# the cases


def test_a_shape_that_does_not_fit_is_skipped_with_a_note(timer: FakeTimer, tmp_path: Path) -> None:
    shapes = ("--shape", "2048,8,32768", "--shape", "1,8,1024")
    done = run(*DECODE, *shapes, "--csv", tmp_path / "rows", "--only", "parallax_gen", "--only", "fla")
    assert "skipped: inputs and results take 275 GB, and the card has 151\n" in done.stdout
    assert {shape.batch for _, shape, _ in timer.compared} == {1}
    skipped = lines_of(tmp_path / "rows")[:2]
    assert all(line["note"].startswith("skipped: ") and line["time_us"] == "" for line in skipped)


def test_bytes_needed() -> None:
    caches, queries = 2 * 4 * 8 * 1024 * 128 * 2, 3 * 4 * 8 * 128 * 2
    assert bytes_needed("decode", KernelSpec("decode", 128, "bf16"), Shape(4, 8, 8, 1, 1024)) == caches + queries
    step = KernelSpec("forward", 128, "bf16", causal=True, stats=True)
    row = 8 * 1024 * 128 * 2
    needed = bytes_needed(TRAINING, step, Shape(1, 8, 8, 1024, 1024))
    assert 11 * row < needed < 14 * row  # q r k v o do, four gradients, v_mean, and row statistics
    windowed = dataclasses.replace(step, window=True)
    assert bytes_needed(TRAINING, windowed, Shape(1, 8, 8, 1024, 1024, 64)) == needed


def test_the_paper_grid_has_decode_and_training(timer: FakeTimer) -> None:
    run("bench", "--grid", "paper", "--only", "parallax_gen")
    for op in ("decode", TRAINING):
        shapes = [shape for of, shape, _ in timer.compared if of == op]
        assert (min(s.batch for s in shapes), max(s.batch for s in shapes)) == (1, 2048)
        assert (min(s.seqlen_kv for s in shapes), max(s.seqlen_kv for s in shapes)) == (128, 32768)
    assert set(timer.efforts) == {GRID_EFFORT}
    timer.compared.clear()
    run("bench", "--grid", "paper", "--op", "training", "--only", "fla")
    assert {op for op, _, _ in timer.compared} == {TRAINING}


def test_quick_times_fewer_shapes_and_marks_every_row(timer: FakeTimer, tmp_path: Path) -> None:
    done = run("bench", "--grid", "paper", "--quick", "--csv", tmp_path / "rows")
    assert set(timer.efforts) == {QUICK_EFFORT}
    assert QUICK_EFFORT.rounds * QUICK_EFFORT.timed_ms < FULL_EFFORT.rounds * FULL_EFFORT.timed_ms
    assert len({(op, shape) for op, shape, _ in timer.compared}) == 2 * QUICK_SHAPES
    assert {line["quick"] for line in lines_of(tmp_path / "rows")} == {"True"}
    tables = [line for line in done.stdout.splitlines() if ": batch " in line]
    assert len(tables) == 12
    assert all(line.endswith("(quick)") for line in tables)
    assert "quick: not for publication" in done.stdout


def test_quick_spreads_its_shapes_over_those_that_fit() -> None:
    cases = list(cases_of(("decode", TRAINING), None, "bf16", (), "paper", NO_FLAGS))
    quick_shapes = [case.shape for case in quick_cases(cases, H200) if case.op == "decode"]
    assert quick_shapes[0] == Shape(1, 8, 8, 1, 128)
    assert quick_shapes[-1] == Shape(2048, 8, 8, 1, 16384)
    assert len(set(quick_shapes)) == len(quick_shapes) == QUICK_SHAPES
    single_case = list(cases_of(("decode",), None, "bf16", (Sizes(1, 8, 8, None, 64),), None, Flags()))
    assert quick_cases(single_case, H200) == single_case
    huge = list(cases_of(("decode",), None, "bf16", (Sizes(2048, 64, 64, None, 131072),), None, Flags()))
    assert quick_cases(huge, H200) == huge  # it stays, so that a row says that it was skipped


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--grid", "serving", "--op", "training"), "--grid serving needs --op decode, and no --shape"),
        (
            ("--grid", "paper", "--op", "forward"),
            "--grid paper needs --op decode or training, and no --shape",
        ),
        (("--grid", "paper", "--shape", "1,8,64"), "and no --shape"),
        (("--only", "FA2"), "'FA2' is not one of"),
        (("--only", "fla", "--skip", "fla"), "--only and --skip leave no baseline to time"),
        (("--picture", "a.png"), "--picture needs --op decode"),
    ],
)
def test_invalid_options_are_usage_errors_before_anything_is_timed(
    timer: FakeTimer, arguments: tuple[str, ...], message: str
) -> None:
    done = run("bench", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert timer.compared == []


def test_skip_and_oracle(timer: FakeTimer) -> None:
    done = run(*DECODE, "--shape", "1,8,64", "--skip", "fla", "--oracle", "sample", "--json")
    assert [row["contender"] for row in json.loads(done.stdout)["rows"]] == [
        name for name in BASELINES if name not in ("fla", BATCH_INVARIANT)
    ]
    assert timer.efforts == [dataclasses.replace(FULL_EFFORT, oracle="sample")]


def test_batch_invariant_calls_are_one_more_baseline(timer: FakeTimer) -> None:
    """At the same cases: --batch-invariant is not a flag of theirs."""
    done = run(*DECODE, "--shape", "1,8,64", "--batch-invariant", "--only", OURS, "--json")
    rows = json.loads(done.stdout)["rows"]
    assert [row["contender"] for row in rows] == [OURS, BATCH_INVARIANT]
    assert rows[0]["package"] != rows[1]["package"]  # other kernels
    assert not any("batch_invariant" in row["spec"] for row in rows if isinstance(row.get("spec"), dict))


def test_a_full_disk_is_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = ResultsCsv(tmp_path / "rows")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("parallax_gen.bench.results_csv._append", full)
    with pytest.raises(ParallaxGenError, match=r"cannot be written: .*No space left"):
        results.add([ROW])
