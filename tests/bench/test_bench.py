"""`parallax-gen bench` without a GPU: its messages, and how rows become tables, files and means."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from cli_samples import run, run_json

from parallax_gen.bench import compare as comparing
from parallax_gen.bench.baselines import BASELINES, baselines_of
from parallax_gen.bench.parts import PARTS
from parallax_gen.bench.rows import Effort, Row
from parallax_gen.bench.summary import mean_lines
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import TRAINING

SPEC, SHAPE = KernelSpec("decode", 128, "bf16"), Shape(1, 8, 8, 1, 4096)
ROWS = [
    Row("parallax_gen", "decode", "decode", SPEC, SHAPE, 8.0, 2097.0, 2e-3, peaked_error=1.6e-3),
    Row("SDPA flash", "decode", "decode", SPEC, SHAPE, 16.0, 1048.0),
    Row("fla", "decode", "decode", SPEC, SHAPE, note="not installed"),
]

STEP = KernelSpec("forward", 96, "bf16", group=4, causal=True, stats=True, window=True)
STEP_SHAPE = Shape(1, 32, 8, 16384, 16384, 4096)
STEP_ROWS = [
    Row(name, TRAINING, part, STEP, STEP_SHAPE, time_us, rate, error, note, peaked_error=error and peaked)
    for name, values in {
        "parallax_gen": [(1234.5, 640.5, 2e-3, ""), (12345.6, 400.0, 4e-3, ""), (13579.1, 450.0, 4e-3, "")],
        "SDPA cuDNN": [(2469.0, 310.0, None, ""), (12345.6, 400.0, None, ""), (15000.0, 350.0, None, "")],
        "parallax-kernel Triton": [(4938.0, 500.0, 2e-3, ""), *[(30000.0, 200.0, 1.5e-1, "without a CUDA graph")] * 2],
        "fla": [(None, None, None, "not installed")] * 3,
    }.items()
    for part, (time_us, rate, error, note), peaked in zip(PARTS[TRAINING], values, (1.5e-2, None, 1.5e-2), strict=True)
]

compared: list[tuple[str, KernelSpec, Shape]] = []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_is_an_error() -> None:
    done = run("bench")
    assert done.exit_code == 1
    assert done.stderr == "error: there is no CUDA device here, so nothing can be timed\n"


@pytest.fixture
def _fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    compared.clear()

    def compare(
        op: str, spec: KernelSpec, shape: Shape, only: tuple[str, ...], effort: Effort, lengths: tuple[int, ...]
    ) -> list[Row]:
        compared.append((op, spec, shape))
        result = STEP_ROWS if op == TRAINING else ROWS if shape == SHAPE else []
        return [row for row in result if not only or row.baseline in only]

    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: gpu_by_name("h200"))
    monkeypatch.setattr(comparing, "compare", compare)
    monkeypatch.setattr("sys.argv", ["parallax-gen", "bench", "--csv", "a file"])


@pytest.mark.usefixtures("_fake_gpu")
def test_table_means_and_csv(tmp_path: Path) -> None:
    done = run("bench", "--op", "decode", "--shape", "1,8,4096", "--csv", tmp_path / "rows")
    assert done.exit_code == 0, done.output
    cells = [line.split() for line in done.stdout.splitlines()[1:5]]
    assert [line[-2:] for line in cells[:3]] == [["error", "peaked"], ["2.0e-03", "1.6e-03"], ["softmax", "-"]]
    assert cells[3] == ["fla", *"-------"]
    assert "not installed" in done.stdout
    assert "decode: SDPA flash takes 2.00x our time (geometric mean of 1 shape, least 2.00x)" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    with (tmp_path / "rows").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["contender"] for row in rows] == [row.baseline for row in ROWS]
    assert rows[0]["seqlen_kv"] == "4096"
    assert (rows[0]["op"], rows[0]["part"]) == ("decode", "decode")
    assert [(row["time_us"], row["peaked_error"]) for row in rows] == [("8.0", "0.0016"), ("16.0", ""), ("", "")]


@pytest.mark.usefixtures("_fake_gpu")
def test_json() -> None:
    document = run_json("bench", "--op", "decode", "--shape", "1,8,4096")
    assert document["gpu"] == "h200"
    assert [row["time_us"] for row in document["rows"]] == [8.0, 16.0, None]


@pytest.mark.usefixtures("_fake_gpu")
def test_a_training_step_is_one_line_per_baseline() -> None:
    arguments = ("--op", "training", "--head-dim", "96", "--shape", "1,32/8,16384", "--window", "4096")
    done = run("bench", *arguments)
    assert done.exit_code == 0, done.output
    assert compared == [(TRAINING, STEP, STEP_SHAPE)]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("training, head_dim 96, bf16, GQA 4:1, window: batch 1, heads 32/8")
    assert lines[1].split() == "fwd ms TF/s bwd ms TF/s step ms TF/s error peaked".split()  # noqa: SIM905
    assert lines[2].split() == "parallax_gen 1.234 640.5 12.35 400.0 13.58 450.0 4.0e-03 1.5e-02".split()  # noqa: SIM905
    assert lines[3].split()[-2:] == ["softmax", "-"]
    assert lines[4].split()[-2:] == ["1.5e-01", "1.5e-02"]
    assert lines[5].split() == ["fla", *"--------"]
    assert lines[6] == "parallax-kernel Triton, backward and step: without a CUDA graph"
    assert lines[7] == "fla: not installed"
    assert max(map(len, lines[1:6])) <= 88


@pytest.mark.usefixtures("_fake_gpu")
def test_means_are_per_part() -> None:
    other = [row for row in STEP_ROWS if row.baseline in ("parallax_gen", "SDPA cuDNN")]
    longer = [
        Row(row.baseline, row.op, row.part, row.spec, Shape(1, 8, 8, 999, 999), 8 * row.time_us * (1 + is_peer), 1.0)
        for row in other
        if row.time_us
        for is_peer in (row.baseline != "parallax_gen",)
    ]
    lines = mean_lines([*STEP_ROWS, *longer])
    assert lines[0] == "training forward: SDPA cuDNN takes 2.83x our time (geometric mean of 2 shapes, least 2.00x)"
    assert (
        lines[1]
        == "training forward: parallax-kernel Triton takes 4.00x our time (geometric mean of 1 shape, least 4.00x)"
    )
    assert lines[2] == "training backward: SDPA cuDNN takes 1.41x our time (geometric mean of 2 shapes, least 1.00x)"
    assert len(lines) == 6
    assert not any("fla" in line for line in lines)


@pytest.mark.usefixtures("_fake_gpu")
def test_training_rows_as_csv_and_json(tmp_path: Path) -> None:
    arguments = ("bench", "--op", "training", "--shape", "1,32/8,16384")
    run(*arguments, "--csv", tmp_path / "rows")
    with (tmp_path / "rows").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == ["forward", "backward", "step"] * 4
    assert {row["op"] for row in rows} == {"training"}
    assert {row["window"] for row in rows} == {"4096"}
    assert (rows[1]["time_us"], rows[1]["error"]) == ("12345.6", "0.004")
    assert rows[7]["note"] == "without a CUDA graph"
    result = run_json(*arguments, "--only", "fla")["rows"]
    assert [(row["contender"], row["part"], row["time_us"]) for row in result] == [
        ("fla", part, None) for part in ("forward", "backward", "step")
    ]


@pytest.mark.usefixtures("_fake_gpu")
def test_rows_of_several_ops_go_into_one_csv(tmp_path: Path) -> None:
    run("bench", "--op", "decode", "--op", "training", "--shape", "1,8,4096", "--csv", tmp_path / "rows")
    with (tmp_path / "rows").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["window"] for row in rows] == ["0"] * 3 + ["4096"] * 12


@pytest.mark.usefixtures("_fake_gpu")
def test_default_ops_shapes_and_windows() -> None:
    run("bench")
    assert {op for op, _, _ in compared} == {"forward", "decode"}
    compared.clear()
    run("bench", "--op", "training")
    assert len(compared) == len(set(compared)) == 13
    assert [(spec.head_dim, shape) for _, spec, shape in compared[:2]] == [
        (128, Shape(4, 16, 16, 4096, 4096)),
        (128, Shape(1, 16, 16, 16384, 16384)),
    ]
    assert all(spec.stats and spec.causal and spec.op == "forward" for _, spec, _ in compared)
    assert {shape.window for _, spec, shape in compared if spec.window} == {513, 4096}
    compared.clear()
    run("bench", "--op", "training", "--full")
    assert len(compared) == 10  # without windows some are the same
    assert not any(spec.causal or shape.window for _, spec, shape in compared)
    compared.clear()
    run("bench", "--op", "training", "--head-dim", "96")
    assert [shape for _, _, shape in compared] == [Shape(4, 32, 32, 4096, 4096)]


@pytest.mark.usefixtures("_fake_gpu")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "dkdv"), "'dkdv' is not one of"),
        (("--op", "training", "--stats"), "--stats needs --op forward or decode, not training"),
        (("--op", "training", "--leftpad"), "--leftpad needs --op decode, not training"),
        (("--op", "training", "--head-dim", "72"), "no usual shape of training has head_dim 72"),
        (("--head-dim", "100"), "100 is not a multiple of 8 from 8 to 256"),
    ],
)
def test_invalid_options_are_usage_errors(arguments: tuple[str, ...], message: str) -> None:
    done = run("bench", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert compared == []


def test_help_lists_the_baselines() -> None:
    text = " ".join(run("bench", "--help").stdout.split())
    assert all(name in text for name in BASELINES)


def test_ours_is_first() -> None:
    for op in PARTS:
        names = [baseline.name for baseline in baselines_of(op)]
        assert names[0] == "parallax_gen"
        assert len(names) >= 5


def test_json_of_an_error_that_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("fla", "decode", "decode", SPEC, SHAPE, 5.0, 1.0, float("inf"))
    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: gpu_by_name("h200"))
    monkeypatch.setattr(comparing, "compare", lambda *_: [row])
    document = json.loads(run("bench", "--op", "decode", "--shape", "1,8,4096", "--json").stdout)
    assert document["rows"][0]["error"] is None
