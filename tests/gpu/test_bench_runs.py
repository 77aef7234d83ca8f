"""Short runs of `parallax-gen bench` on a card: timing, checks and resuming."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from parallax_gen.cli import main
from parallax_gen.oracle.accuracy import tolerance
from parallax_gen.tuning.workers.measure import time_call, time_eagerly

pytestmark = pytest.mark.gpu

BASELINE_OPTIONS = ("--only", "parallax_gen", "--only", "SDPA flash", "--quick")
SHAPE_OPTIONS = ("--op", "decode", "--op", "training", "--shape", "2,8/4,512")


def test_bench_times_checks_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    first = CliRunner().invoke(main, ["bench", *SHAPE_OPTIONS, *BASELINE_OPTIONS, "--csv", str(path)])
    assert first.exit_code == 0, first.output
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + 3)
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["time_us"]) <= float(row["p80_us"]), row
        if row["contender"] == "parallax_gen":
            assert float(row["error"]) < tolerance("bf16")
            if row["part"] != "backward":  # with |t| roundings it would be 1.3e-2
                assert float(row["peaked_error"]) < tolerance("bf16") / 2
    second = CliRunner().invoke(main, ["bench", *SHAPE_OPTIONS, *BASELINE_OPTIONS, "--csv", str(path)])
    assert second.stdout == first.stdout


def test_different_lengths_in_each_cache_layout() -> None:
    selection = ("--only", "parallax_gen", "--quick", "--oracle", "whole", "--json")
    case_options = ("--shape", "8,32/8,4096", "--lengths", "4096,7x128", "--page-size", "0", "--page-size", "16")
    done = CliRunner().invoke(main, ["bench", *case_options, *selection])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [row["spec"].get("page_size", 0) for row in rows] == [0, 16]
    for row in rows:
        assert (row["lengths"], row["checked"]) == ("4096,7x128", 64)
        assert row["error"] < tolerance("bf16")
        assert row["peaked_error"] < tolerance("bf16") / 2
        moved = 2 * 128 * (2 * 8 * (4096 + 7 * 128) + 3 * 8 * 32)
        assert row["rate"] == pytest.approx(moved / row["time_us"] / 1e3)


def test_a_shape_that_does_not_fit_is_skipped() -> None:
    done = CliRunner().invoke(main, ["bench", "--op", "decode", "--shape", "2048,64,131072", *BASELINE_OPTIONS])
    assert done.exit_code == 0, done.output
    assert "skipped: inputs and results take " in done.stdout


def test_random_numbers_after_a_failed_capture() -> None:
    """torch's generator on the card expects a graph until a capture succeeds."""
    x = torch.ones(64, device="cuda")

    def waits_for_the_card() -> float:
        return float(x.sum())

    with pytest.raises(RuntimeError, match="captur"):
        time_call(waits_for_the_card, timed_ms=1.0)
    torch.cuda.synchronize()
    assert time_eagerly(waits_for_the_card, 3).median_us > 0
    assert torch.randn(64, device="cuda").isfinite().all()
