"""`parallax-gen bench` without a GPU: what it says, and how rows become tables, files and means."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from parallax_gen.cli import bench as bench_module
from parallax_gen.cli import main
from parallax_gen.cli.compare import Row
from parallax_gen.cli.peers import contenders
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

SPEC, SHAPE = KernelSpec("decode", 128, "bf16"), Shape(1, 8, 8, 1, 4096)
ROWS = [
    Row("parallax_gen", SPEC, SHAPE, 8.0, 2097.0, 2e-3),
    Row("SDPA flash", SPEC, SHAPE, 16.0, 1048.0),
    Row("fla", SPEC, SHAPE, why_not="not installed"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so() -> None:
    done = CliRunner().invoke(main, ["bench"])
    assert done.exit_code == 1
    assert done.stderr == "error: there is no CUDA device here: nothing can be timed\n"


@pytest.fixture
def _on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "card_here", lambda: gpu_by_name("h200"))
    monkeypatch.setattr(bench_module, "_compare", lambda spec, shape, only: ROWS if shape == SHAPE else [])


@pytest.mark.usefixtures("_on_a_card")
def test_table_means_and_csv(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["bench", "--op", "decode", "--shape", "1,8,4096", "--csv", str(tmp_path / "rows")])
    assert done.exit_code == 0, done.output
    assert "SDPA flash" in done.stdout
    assert "not installed" in done.stdout
    assert "decode: SDPA flash takes 2.00 times ours (geometric mean of 1, least 2.00)" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    with (tmp_path / "rows").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["contender"] for row in rows] == [row.contender for row in ROWS]
    assert rows[0]["seqlen_kv"] == "4096"
    assert rows[2]["time_us"] == ""


@pytest.mark.usefixtures("_on_a_card")
def test_json() -> None:
    done = CliRunner().invoke(main, ["bench", "--op", "decode", "--shape", "1,8,4096", "--json"])
    document = json.loads(done.stdout)
    assert document["gpu"] == "h200"
    assert [row["time_us"] for row in document["rows"]] == [8.0, 16.0, None]


def test_contenders_are_named_once_and_ours_is_first() -> None:
    for op in ("forward", "decode"):
        names = [contender.name for contender in contenders(op)]
        assert names[0] == "parallax_gen"
        assert len(set(names)) == len(names) >= 5
