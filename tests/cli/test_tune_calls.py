"""tune --calls, on a simulated GPU: the kernels that take the most time, by their calls and times."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_samples import run, run_json

from parallax_gen.memory.calls import Kernel, add_calls
from parallax_gen.memory.store import Store
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec

QUICK = ("--trials", "2", "--workers", "1")
FORWARD = KernelSpec("forward", 64, "bf16", causal=True), Bucket(8, 2048, 2048)
LONG = FORWARD[0], Bucket(8, 8192, 8192)
PAGED = KernelSpec("decode_varlen", 128, "bf16", 4, page_size=16), Bucket(64, 1, 8192)


def file_of(path: Path, counts: dict[Kernel, int]) -> Path:
    add_calls(path, counts)
    return path


def begun(stderr: str) -> list[str]:
    return [line.split("h200: ")[1] for line in stderr.splitlines() if line.startswith("[")]


def test_the_costliest_kernels_come_first(fake_h200: None, store: Store, tmp_path: Path) -> None:
    path = file_of(tmp_path / "calls.jsonl", {FORWARD: 100, LONG: 100, PAGED: 30})
    result = run("tune", "--calls", path, *QUICK, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert begun(result.stderr) == [f"{spec}; {bucket}" for spec, bucket in (LONG, FORWARD, PAGED)]
    title, columns, *lines = result.stderr.split("\n\n")[0].splitlines()
    assert title == "230 recorded calls of 3 kernels; on h200"
    assert columns.split() == ["kernel", "BxH", "seqlen", "calls", "config", "from", "of", "the", "time"]
    rows = [line.split() for line in lines]
    assert [row[:4] for row in rows] == [
        ["forward", "8", "8192", "100"],
        ["forward", "8", "2048", "100"],
        ["decode", "64", "8192", "30"],
    ]
    shares = [float(row[-2]) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert len(store.all()) == 6
    assert max(map(len, (title, columns, *lines, *result.stdout.split("\n\n")[0].splitlines()))) <= 80


def test_a_step_sums_all_calls(fake_h200: None, tmp_path: Path) -> None:
    path = file_of(tmp_path / "calls.jsonl", {FORWARD: 100, PAGED: 30})
    (step,) = run_json("tune", "--calls", path, *QUICK)["steps"]
    assert step["step"] == "recorded calls"
    assert [kernel["calls"] for kernel in step["kernels"]] == [100, 30]
    assert step["time_us"] == sum(kernel["calls"] * kernel["time_us"] for kernel in step["kernels"])


def test_it_stops_where_the_rest_is_negligible(fake_h200: None, store: Store, tmp_path: Path) -> None:
    path = file_of(tmp_path / "calls.jsonl", {LONG: 1000, FORWARD: 1, PAGED: 1})
    result = run("tune", "--calls", path, *QUICK)
    assert begun(result.stderr) == [f"{LONG[0]}; {LONG[1]}"]
    assert "recorded calls: 2 others take less than 1 % of the time" in result.stdout
    path = file_of(tmp_path / "even.jsonl", {LONG: 1, FORWARD: 1, PAGED: 1})
    assert len(begun(run("tune", "--calls", path, *QUICK).stderr)) == 3


def test_the_plan_asks_above_ten_minutes(fake_h200: None, store: Store, tmp_path: Path) -> None:
    path = file_of(tmp_path / "calls.jsonl", {FORWARD: 1, PAGED: 1})
    result = run("tune", "--calls", path, "--time-budget", "400", *QUICK)
    assert result.exit_code == 2
    assert "2 jobs on 1 device: 14 min at most" in result.stderr
    assert "--yes begins without asking" in result.stderr
    assert store.all() == []


def test_a_refresh_times_only_them(fake_h200: None, store: Store, tmp_path: Path) -> None:
    path = file_of(tmp_path / "calls.jsonl", {PAGED: 1})
    run("tune", "--op", "decode", "--shape", "32,32/8,8192", *QUICK)
    result = run("tune", "--calls", path, "--refresh", *QUICK)
    assert result.exit_code == 0, result.output
    assert begun(result.stderr) == [f"{PAGED[0]}; {PAGED[1]}"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "folder"),
        ("--for", "training", "--heads", "8"),
        ("--op", "decode"),
        ("--shape", "1,8,1024"),
        ("--grid", "serving"),
        ("--head-dim", "64"),
        ("--dtype", "fp16"),
        ("--ragged",),
    ],
)
def test_options_that_choose_kernels_are_refused(arguments: tuple[str, ...], store: Store, tmp_path: Path) -> None:
    path = file_of(tmp_path / "calls.jsonl", {PAGED: 1})
    result = run("tune", "--gpu", "h200", "--calls", path, *arguments)
    assert result.exit_code == 2
    assert "--calls has the kernels and sizes: leave out" in result.stderr
    assert store.all() == []


def test_a_missing_file_is_wrong_usage(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "nowhere.jsonl"
    for command in (("tune",), ("lock", "-o", tmp_path / "k.lock")):
        result = run(*command, "--gpu", "h200", "--calls", path)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert result.stderr.startswith(f"error: Invalid value for '--calls': File '{path}' does not exist.")


def test_a_malformed_file_is_one_line(store: Store, tmp_path: Path) -> None:
    path = file_of(tmp_path / "calls.jsonl", {PAGED: 1})
    with path.open("a", encoding="utf-8") as file:
        file.write("__import__('os')\n")
    result = run("tune", "--gpu", "h200", "--calls", path)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith(f"error: {path}, line 2: not a kernel and its calls: ")
    (tmp_path / "empty").touch()
    result = run("tune", "--gpu", "h200", "--calls", tmp_path / "empty", *QUICK)
    assert result.exit_code == 2
    assert "calls: got a recording of no calls; allowed: " in result.stderr
    assert store.all() == []
