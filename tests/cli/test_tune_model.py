"""tune --model and --for, on a simulated GPU and without one; and explain of the same steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
from cli_samples import H200, run, run_json

from parallax_gen.memory.ranking import default_of
from parallax_gen.memory.store import Store

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
WINDOWED = {**LLAMA, "model_type": "mistral", "sliding_window": 200}
QUICK = ("--trials", "2", "--workers", "1")
ONE_DECODE = ("--for", "serving", "--heads", "8/2", "--head-dim", "16", "--page-size", "16", "--max-batch", "1")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "Tiny-1B", LLAMA)


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_the_kernels_of_a_model_are_tuned(fake_h200: None, store: Store, model: Path) -> None:
    result = run("tune", "--model", model, "--max-batch", "2", *QUICK, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    plan, _, progress = result.stderr.partition("[1/")
    lines = plan.splitlines()
    assert lines[0] == "Tiny-1B: 3 layers, heads 8/2, head_dim 16, bf16; on h200"
    assert lines[1].split() == ["kernel", "BxH", "seqlen", "calls", "config", "from", "step"]
    assert lines[2].split() == ["forward", "8", "512", "3", "the", "default", "training"]
    assert ["decode", "4", "512", "3", "the", "default", "decode,", "batch", "2"] in [line.split() for line in lines]
    assert "configs now: 12 the default" in lines
    assert lines[-1] == "12 jobs on 1 device: 10 min at most; Ctrl-C loses no trial"
    assert progress.startswith("12] h200: ")
    assert "\n1 of 12 jobs done, about " in progress
    assert "\n11 of 12 jobs done, about " in progress
    places = {record.place for record in store.all()}
    assert len(places) == 12
    assert {place.spec.op for place in places} == {"forward", "preprocess", "dkdv", "dqdr", "decode", "decode_varlen"}


def test_at_the_end_each_kernels_gain_and_the_sum_of_a_step(fake_h200: None, store: Store, model: Path) -> None:
    result = run("tune", "--model", model, "--training", *QUICK, env={"COLUMNS": "80"})
    title, columns, *lines = result.stdout.split("\n\n")[0].splitlines()
    assert title == "training: batch 4, 512 tokens"
    assert columns.split() == ["kernel", "seqlen", "calls", "default", "us", "best", "us", "gain", "config"]
    rows = [line.split()[:6] for line in lines if line[0] != " "]
    times = {}
    for place in dict.fromkeys(record.place for record in store.all()):
        fastest, *others = (record for record in store.results(place) if record.measured)
        (default,) = (record for record in (fastest, *others) if record.config == default_of(place, H200))
        assert default.time_us is not None
        assert fastest.time_us is not None
        times[place.spec.op] = default.time_us, fastest.time_us
    assert {row[0]: tuple(map(float, row[3:5])) for row in rows[:-1]} == times
    assert any(default_us > best_us for default_us, best_us in times.values())
    assert [row[2] for row in rows[:-1]] == ["3"] * 4
    default_us, best_us = (3 * sum(column) for column in zip(*times.values(), strict=True))
    assert rows[-1] == ["sum", "12", f"{default_us:.0f}", f"{best_us:.0f}", f"{default_us / best_us:.2f}x"]
    assert max(map(len, (title, columns, *lines))) <= 80
    document = json.loads(run("tune", "--model", model, "--training", *QUICK, "--json").stdout)
    (step,) = document["steps"]
    assert (step["step"], step["sizes"]) == ("training", "batch 4, 512 tokens")
    assert [kernel["calls"] for kernel in step["kernels"]] == [3] * 4
    assert step["default_us"] == sum(3 * kernel["default_us"] for kernel in step["kernels"])
    assert step["gain"] == step["default_us"] / step["time_us"] > 1
    assert len(document["jobs"]) == 4


def test_tables_fit_80_columns(fake_h200: None, tmp_path: Path) -> None:
    config = {**WINDOWED, "num_attention_heads": 64, "num_key_value_heads": 64, "hidden_size": 8192}
    config |= {"max_position_embeddings": 131072, "sliding_window": 32768}
    arguments = ("--model", write_model(tmp_path / "m", config), "--max-len", "131072", "--seqlen", "131072", "--yes")
    result = run("tune", *arguments, *QUICK, "--page-size", "16", env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    tables = [*result.stdout.split("config: M, N, H")[0].splitlines(), *result.stderr.split("[1/")[0].splitlines()]
    assert "2048x131072 W32768" in result.stdout
    assert {line for line in tables if len(line) > 80} == set()
    shown = run("explain", "--gpu", "h200", *arguments[:-1], env={"COLUMNS": "80"}).stdout
    assert {line for line in shown.split("config: M, N, H")[0].splitlines() if len(line) > 80} == set()


def test_without_a_card_times_are_predicted_and_said_to_be(store: Store) -> None:
    """With real compilers."""
    result = run("tune", *ONE_DECODE, "--chunk", "16", "--trials", "1", "--workers", "1")
    assert result.exit_code == 0, result.output
    notes = result.stderr.splitlines()
    assert notes[0] == "no CUDA device here, so this is for h200: --gpu names another card"
    assert "no CUDA device here: compiling and ranking only, nothing will be measured (predicted)" in notes
    assert notes[-1] == "nothing was measured: these times are predicted, and dispatch does not use them"
    assert "predicted us" in result.stdout
    assert "best us" not in result.stdout
    assert {record.outcome for record in store.all("h200")} == {"predicted"}
    assert result.stdout.count("1.00x") == 4  # the only config is the default, in two kernels and two sums


def test_tensor_parallel_ranks_have_fewer_heads(fake_h200: None, store: Store, model: Path) -> None:
    run("tune", "--model", model, "--tp", "2", "--training", "--batch", "1", *QUICK)
    buckets = {record.place.spec.op: record.place.bucket.kv_rows for record in store.all()}
    assert buckets == {"forward": 1, "preprocess": 4, "dkdv": 1, "dqdr": 1}
    refused = run("tune", "--model", model, "--tp", "3")
    assert (refused.exit_code, refused.stderr) == (
        2,
        "error: --tp: got 3; allowed: a divisor of the model's 2 kv heads\n",
    )


def test_kernels_without_a_model(fake_h200: None, store: Store) -> None:
    arguments = ("--for", "training", "--heads", "4/2", "--head-dim", "64", "--window", "300", "--softcap")
    result = run("tune", *arguments, "--batch", "2", "--seqlen", "1024", "--dtype", "fp16", *QUICK)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(
        "one layer: 1 layer (1 with window 300), heads 4/2, head_dim 64, fp16, softcap; on "
    )
    specs = {record.place.spec.op: record.place.spec for record in store.all()}
    assert list(specs) == ["dkdv", "dqdr", "forward", "preprocess"]
    assert all(spec.head_dim == 64 and spec.dtype == "fp16" for spec in specs.values())
    assert specs["forward"].window
    assert specs["forward"].softcap


def test_what_is_known_is_tuned_last_and_again(fake_h200: None, store: Store, model: Path) -> None:
    run("tune", "--model", model, "--training", *QUICK)
    result = run("tune", "--model", model, "--max-batch", "1", *QUICK)
    plan, _, progress = result.stderr.partition("[1/")
    assert "configs now: 4 measured here, 4 the default\n" in plan
    assert ["forward", "8", "512", "3", "measured", "here", "training"] in [line.split() for line in plan.splitlines()]
    begun = [line for line in progress.splitlines() if "h200: " in line]
    assert ["stats" in line for line in begun].index(True) >= 4


# Asking


def asking(*arguments: object, answer: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    from click.testing import CliRunner

    from parallax_gen.cli import main

    monkeypatch.setattr("parallax_gen.cli.models.is_interactive", lambda: True)
    return CliRunner().invoke(main, [str(argument) for argument in ("tune", *arguments)], input=answer)


LONG = ("--training", "--time-budget", "200", *QUICK)  # four jobs: more than ten minutes at most


def test_it_asks_above_ten_minutes(fake_h200: None, store: Store, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = asking("--model", model, *LONG, answer="n\n", monkeypatch=monkeypatch)
    assert refused.exit_code == 1
    assert "4 jobs on 1 device: 14 min at most" in refused.stderr
    end = r"Begin\? \[Y/n\]:( n\n)?error: not confirmed, so nothing was done$"  # click 8.3 shows no answer
    assert re.search(end, refused.stderr.rstrip())
    assert store.all() == []
    agreed = asking("--model", model, *LONG, answer="\n", monkeypatch=monkeypatch)
    assert agreed.exit_code == 0
    assert store.all() != []


def test_ctrl_c_at_the_question(fake_h200: None, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        """Do as click.confirm does."""
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise click.Abort from None

    monkeypatch.setattr("click.confirm", interrupted)
    stopped = asking("--model", model, *LONG, answer="", monkeypatch=monkeypatch)
    assert stopped.exit_code == 130
    assert "error:" not in stopped.stderr


def test_where_nobody_can_answer_it_needs_yes(fake_h200: None, store: Store, model: Path) -> None:
    result = run("tune", "--model", model, *LONG)
    assert result.exit_code == 2
    assert "this may take more than 10 min: --yes begins without asking" in result.stderr
    assert store.all() == []
    assert run("tune", "--model", model, *LONG, "--yes").exit_code == 0
    assert run("tune", "--model", model, *LONG, "--refresh").exit_code == 0  # a refresh takes seconds a job


def test_several_devices_take_less_time(fake_h200: None, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("tune", "--model", model, *LONG, "--devices", "0,1")
    assert "4 jobs on 2 devices: 7 min at most" in result.stderr
    assert result.exit_code == 0


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--for", "training"), "give either --model, or --for with --heads"),
        (("--heads", "8/2"), "give either --model, or --for with --heads"),
        (("--model", "{model}", "--heads", "8/2"), "give either --model, or --for with --heads"),
        (("--for", "training", "--heads", "8/3"), "'8/3' is not query heads/kv heads, such as 32/8"),
        (("--for", "training", "--heads", "0"), "'0' is not query heads/kv heads, such as 32/8"),
        (("--model", "{model}", "--op", "decode"), "leave out --op, --shape and --grid"),
        (("--model", "{model}", "--shape", "1,8,512"), "leave out --op, --shape and --grid"),
        (("--model", "{model}", "--grid", "serving"), "leave out --op, --shape and --grid"),
        (("--model", "{model}", "--head-dim", "64"), "one --head-dim only without --model"),
        (("--model", "{model}", "--dtype", "fp16", "--dtype", "bf16"), "give one --dtype"),
        (("--model", "{model}", "--window", "64"), "allow only these flags of kernels: --batch-invariant; --page-size"),
        (("--model", "{model}", "--varlen"), "allow only these flags of kernels: --batch-invariant; --page-size"),
        (
            ("--model", "{model}", "--training", "--page-size", "16"),
            "--page-size and --cache-dtype, which need serving",
        ),
        (("--model", "{model}", "--training", "--max-len", "64"), "--max-len needs serving"),
        (("--model", "{model}", "--serving", "--batch", "2"), "--batch needs training"),
        (("--tp", "2"), "need --model or --for"),
        (("--max-batch", "2"), "need --model or --for"),
    ],
)
def test_options_that_do_not_fit_together(arguments: tuple[str, ...], message: str, store: Store, model: Path) -> None:
    given = [argument.replace("{model}", str(model)) for argument in arguments]
    result = run("tune", "--gpu", "h200", *given)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert store.all() == []


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path, store: Store) -> None:
    (tmp_path / "folder").mkdir()
    for name, text in (
        ("text.json", "{"),
        ("list.json", "[]"),
        ("latin.json", "\xe9"),
        ("bert.json", '{"model_type": 1}'),
    ):
        (tmp_path / name).write_text(text, encoding="latin-1")
    expected = {
        "nothing": "nothing, which is not on this machine; allowed: a folder with a config.json, or that file",
        "folder": "config.json'; allowed: a folder with a config.json, or that file",
        "text.json": "text.json, which is not JSON (Expecting property name",
        "list.json": "list.json, which has no fields; allowed: a config.json",
        "latin.json": "latin.json, which is not JSON ('utf-8' codec",
        "bert.json": "bert.json: model_type: got 1; allowed: arcee, cohere, ",
    }
    for name, message in expected.items():
        result = run("tune", "--gpu", "h200", "--model", tmp_path / name)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    assert store.all() == []


# explain


def test_explain_shows_a_steps_kernels(fake_h200: None, model: Path) -> None:
    run("tune", "--model", model, "--training", "--gpu", "h200", *QUICK)
    result = run("explain", "--model", model, "--max-batch", "1", env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Tiny-1B: 3 layers, heads 8/2, head_dim 16, bf16; on h200\n\ntraining: batch 4, ")
    document = run_json("explain", "--model", model, "--max-batch", "1")
    training, decode, *_ = document["steps"]
    assert {kernel["from"] for kernel in training["kernels"]} == {"measured here"}
    assert training["time_us"] == sum(3 * kernel["time_us"] for kernel in training["kernels"])
    assert training["gain"] > 1
    assert decode["kernels"][0]["from"] == "the default"
    assert decode["kernels"][0]["config"] is not None
    assert decode["time_us"] is decode["gain"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --op and --shape, or --model, or --for with --heads"),
        (("--op", "decode"), "give --op and --shape, or --model, or --for with --heads"),
        (("--model", "{model}", "--op", "decode"), "leave out --op and --shape"),
        (("--model", "{model}", "--head-dim", "64"), "one --head-dim only without --model"),
    ],
)
def test_explain_refuses_options_that_do_not_fit(arguments: tuple[str, ...], message: str, model: Path) -> None:
    given = [argument.replace("{model}", str(model)) for argument in arguments]
    result = run("explain", "--gpu", "h200", *given)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
