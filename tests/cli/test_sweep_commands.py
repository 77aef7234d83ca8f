"""`sweep` and `replay`: database to files, and files or records to tables, CSV and a plot."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from cli_samples import OTHER_TOOLCHAIN, PLACE, config, make_record, run, run_json

from parallax_gen.errors import install_command
from parallax_gen.memory.ranking import default_of
from parallax_gen.memory.store import Store
from parallax_gen.ops.space import every_config
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import representative
from parallax_gen.tuning.search.recorded_sweep import read_sweep

SHAPE = representative(PLACE.bucket, PLACE.spec.group)
FEW = ("--sampler", "ours", "--sampler", "random", "--seeds", 3, "--workers", 1)


def record(store: Store, splits: tuple[int, ...]) -> None:
    for number, split in enumerate(splits):
        store.save(make_record(250.0 + number, splits=split, shape=SHAPE))


@pytest.fixture
def partial(store: Store, tmp_path: Path) -> Path:
    """A file with a partial sweep of ten configs."""
    record(store, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32))
    assert run("sweep", "--partial", 10, "--to", tmp_path / "sweeps").exit_code == 0
    (path,) = (tmp_path / "sweeps").iterdir()
    return path


def test_a_complete_sweep_is_written(store: Store, tmp_path: Path) -> None:
    configs = every_config(PLACE.spec, gpu_by_name("h200"))
    one = make_record(shape=SHAPE)  # sweeps do not look at fingerprints, which take longer than the rest
    store.merge(dataclasses.replace(one, config=tried, time_us=100.0 + n) for n, tried in enumerate(configs))
    store.save(make_record(300.0, splits=2, place=dataclasses.replace(PLACE, gpu="h100")))
    done = run("sweep", "--to", tmp_path / "sweeps")
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "sweeps").iterdir()  # the other place's sweep is incomplete
    assert path.name.startswith("h200-decode-128-256x8192-")
    assert path.name in done.output
    sweep = read_sweep(path)
    assert sweep.whole
    assert sweep.place == PLACE


def test_partial_sweeps_are_written_only_with_the_option(store: Store, tmp_path: Path, partial: Path) -> None:
    assert not read_sweep(partial).whole
    assert config(2) in read_sweep(partial).costs
    for arguments in ((), ("--partial", 11), ("--gpu", "h100", "--partial", 1), ("--op", "forward", "--partial", 1)):
        refused = run("sweep", *arguments, "--to", tmp_path / "none")
        assert refused.exit_code == 1
        assert "--partial N" in refused.output
    assert not (tmp_path / "none").exists()
    assert run("sweep", "--partial", 1, "--plain", "--to", tmp_path / "plain").exit_code == 0
    (plain,) = (tmp_path / "plain").iterdir()
    assert read_sweep(plain) == read_sweep(partial)
    assert json.loads(plain.read_text(encoding="utf-8").splitlines()[0])["place"]["spec.op"] == "decode"


def test_a_replay_prints_a_line_per_sampler_and_marks_partial_sweeps(partial: Path) -> None:
    done = run("replay", partial, *FEW)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert "10 configs, PARTIAL" in done.output
    assert [line.split()[0] for line in lines if line.startswith(("ours", "random", "tpe"))] == ["ours", "random"]


def test_a_replay_writes_csv_and_json(partial: Path, tmp_path: Path) -> None:
    document = run_json("replay", partial, *FEW, "--share", 1.0, "--out", tmp_path / "out")
    (sweep,) = document["sweeps"]
    assert (sweep["whole"], sweep["configs"], sweep["best_us"]) == (False, 10, 250.0)
    with (tmp_path / "out" / "regrets.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 10
    for result in sweep["samplers"]:
        sampler_rows = [row for row in rows if row["sampler"] == result["sampler"]]
        assert [float(row["regret"]) for row in sampler_rows] == pytest.approx(result["regret"], abs=1e-5)
        assert float(sampler_rows[-1]["regret"]) == 0.0


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_replay_writes_a_plot(partial: Path, tmp_path: Path) -> None:
    assert run("replay", partial, partial, *FEW, "--out", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "regrets.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_table_is_still_printed(
    partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("replay", partial, *FEW, "--out", tmp_path / "out")
    assert done.exit_code == 0
    assert install_command("pictures") in done.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["regrets.csv"]


def test_what_cannot_be_replayed_is_a_one_line_error(partial: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt.jsonl"
    spoilt.write_text("{}\n", encoding="utf-8")
    refused = run("replay", spoilt, *FEW)
    assert refused.exit_code == 1
    assert "spoilt.jsonl, line 1: not a line of a sweep" in refused.output
    assert run("replay", tmp_path / "missing.jsonl").exit_code == 2
    unknown = run("replay", partial, "--sampler", "best")
    assert unknown.exit_code == 2
    assert "ours, model, corrected, tpe" in " ".join(unknown.output.split())


def tuned(store: Store) -> None:
    """Records of this Triton and another one, and the default's time."""
    default = default_of(PLACE, gpu_by_name("h200"))
    store.save(make_record(200.0, splits=2))
    store.save(make_record(220.0, splits=4))
    store.save(make_record(300.0, config=default))
    store.save(make_record(1.0, splits=4, evidence_changes=OTHER_TOOLCHAIN))


def test_borrowing_is_evaluated_on_shipped_records_and_the_database(store: Store) -> None:
    tuned(store)
    document = run_json("replay", "--borrow")
    result = {line["choice"]: line for line in document["summaries"]}
    here, other_toolchain = result["measured here"], result["another toolchain"]
    assert (here["kind"], here["places"], here["mean"], here["default_mean"]) == ("decode", 1, 1.0, 1.5)
    assert (other_toolchain["mean"], other_toolchain["worst"], other_toolchain["default_worst"]) == (
        pytest.approx(1.1),
        pytest.approx(1.1),
        1.5,
    )
    assert [choice["left_out"] for choice in document["choices"]][:2] == ["nothing", "this toolchain"]
    done = run("replay", "--borrow")
    assert done.exit_code == 0
    (line,) = (line for line in done.output.splitlines() if "another toolchain" in line)
    assert line.split()[-6:] == ["1", "0", "1.100", "1.100", "1.500", "1.500"]
    assert "sets of times: 1\n" in done.output


def test_borrowing_is_evaluated_on_files(store: Store, partial: Path, tmp_path: Path) -> None:
    tuned(store)
    exported = tmp_path / "exported.jsonl"
    assert run("db", "export", exported).exit_code == 0
    for row in store.all():
        store.delete([row])
    result = run_json("replay", "--borrow", exported, partial)
    assert {line["choice"] for line in result["summaries"]} == {"the default"}


def test_invalid_files_for_borrowing_are_a_one_line_error(tmp_path: Path) -> None:
    nothing = run("replay", "--borrow")
    assert (nothing.exit_code, nothing.output.count("\n")) == (1, 1)
    assert "two or more configs of one place, timed with one toolchain" in nothing.output
    spoilt = tmp_path / "spoilt.jsonl"
    spoilt.write_text("{}\n", encoding="utf-8")
    refused = run("replay", "--borrow", spoilt)
    assert refused.exit_code == 1
    assert "spoilt.jsonl, line 1: not a record" in refused.output
    for option in (("--sampler", "tpe"), ("--seeds", 20), ("--out", tmp_path)):
        refused = run("replay", "--borrow", *option)
        assert refused.exit_code == 2
        assert f"--borrow cannot be combined with {option[0]}" in refused.output
    assert "use --borrow" in run("replay").output
