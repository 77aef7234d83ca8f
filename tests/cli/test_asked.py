"""list, show, explain, render and export of the kernels of a training step, and of a model."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from cli_samples import (
    CALL,
    DKDV_PLACE,
    DKDV_SPEC,
    H200,
    OTHER_TOOLCHAIN,
    PLACE,
    SPEC,
    dkdv_config,
    dkdv_record,
    make_record,
    run,
    run_json,
)

from parallax_gen.codegen.render import render
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import default_of
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import config_to_dict
from parallax_gen.ops.space import timed_shape
from parallax_gen.problem.shapes import Bucket, representative
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import bound_us, work_of
from parallax_gen.problem.workloads import STEP
from parallax_gen.runtime.dispatch import choose

STEP_CALL = ("--gpu", "h200", "--op", "training", "--head-dim", "96", "--window", "513", "--shape", "2,32/8,4096")
PREPROCESS = Place("h200", DKDV_SPEC.for_op("preprocess"), Bucket(64, 4096, 4096))
PLACES = {
    op: PREPROCESS if op == "preprocess" else dataclasses.replace(DKDV_PLACE, spec=DKDV_SPEC.for_op(op)) for op in STEP
}
MODEL = {
    "model_type": "mistral",
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "sliding_window": None,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "Tiny").mkdir()
    (tmp_path / "Tiny" / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    return tmp_path / "Tiny"


def save_step(store: Store, factor: float = 2.0) -> dict[str, float]:
    """Save a time of each kernel's default, and of dkdv's best, which is `factor` times as fast."""
    times = {}
    for number, (op, place) in enumerate(PLACES.items()):
        times[op] = 100.0 * (number + 1)
        store.save(make_record(times[op], place=place, config=default_of(place, H200), error=1e-3))
    assert dkdv_config() != default_of(DKDV_PLACE, H200)
    store.save(dkdv_record(times["dkdv"] / factor))
    return times


# explain


def test_explain_a_training_step(store: Store) -> None:
    times = save_step(store)
    (step,) = run_json("explain", *STEP_CALL)["steps"]
    assert [kernel["spec"]["op"] for kernel in step["kernels"]] == list(STEP)
    assert {kernel["from"] for kernel in step["kernels"]} == {"measured here"}
    assert step["default_us"] == sum(times.values()) == 1000.0
    assert step["time_us"] == 1000.0 - 150.0
    assert step["gain"] == 1000.0 / 850.0
    bounds = {op: bound_us(p.spec, representative(p.bucket, p.spec.group), H200) for op, p in PLACES.items()}
    assert [kernel["bound_us"] for kernel in step["kernels"]] == list(bounds.values())
    assert step["bound_us"] == sum(bounds.values())
    title, _, name, columns, *lines = run("explain", *STEP_CALL).stdout.splitlines()
    assert title == "training, head_dim 96, bf16, GQA 4:1, window; on h200"
    assert name == "training: batch 2, heads 32/8, seqlen 4096, window 513"
    assert " ".join(columns.split()) == "kernel seqlen calls default us us gain bound us from config"
    dkdv = next(line for line in lines if line.startswith("dkdv"))
    assert dkdv.split()[:6] == ["dkdv", "4096", "W513", "1", "300.0", "150.0"]
    assert dkdv.endswith("measured here  M64 N128 G4 w8 s2 chunk tma qr")
    assert next(line for line in lines if line.startswith("sum")).split()[:5] == ["sum", "4", "1000", "850.0", "1.18x"]


def test_the_bound_of_a_kernel_is_of_the_lengths_that_its_time_is_of(store: Store) -> None:
    """A tune times sequences of different lengths, which have less to read than the bucket's."""
    spec = KernelSpec("decode_varlen", 128, "bf16", group=4)
    place = Place("h200", spec, Bucket(64, 1, 8192))
    timed = timed_shape(spec, representative(place.bucket, 4))
    at_peak = 1e6 * work_of(spec, timed).bytes / H200.bandwidth
    store.save(make_record(1.01 * at_peak, place=place, config=default_of(place, H200), shape=timed))
    steps = run_json("explain", "--gpu", "h200", "--for", "serving", "--heads", "32/8", "--head-dim", "128")["steps"]
    step = next(step for step in steps if step["step"] == "decode, batch 8")
    assert step["bound_us"] == pytest.approx(at_peak)
    assert step["time_us"] > step["bound_us"]


def test_explain_a_step_names_tiers_and_leaves_unknown_times_out(store: Store) -> None:
    store.save(dkdv_record(300.0, config=default_of(DKDV_PLACE, H200), evidence_changes=OTHER_TOOLCHAIN))
    (step,) = run_json("explain", *STEP_CALL)["steps"]
    assert [kernel["from"] for kernel in step["kernels"]] == [
        "the default",
        "the default",
        "another toolchain",
        "the default",
    ]
    assert [kernel["time_us"] for kernel in step["kernels"]] == [None, None, 300.0, None]
    assert (step["time_us"], step["gain"]) == (None, None)
    assert step["bound_us"] > 0


def test_the_step_that_explain_shows_is_the_step_of_dispatch(store: Store) -> None:
    save_step(store)
    (step,) = run_json("explain", *STEP_CALL)["steps"]
    for kernel, place in zip(step["kernels"], PLACES.values(), strict=True):
        shape = representative(place.bucket, place.spec.group)
        chosen = choose(place.spec, shape, H200, Memory(store)).config
        assert kernel["config"] == config_to_dict(chosen)


# show, render, export


def test_show_and_render_of_a_training_step(store: Store) -> None:
    save_step(store)
    kernels = run_json("show", *STEP_CALL)["kernels"]
    assert [(k["place"]["spec.op"], len(k["results"])) for k in kernels] == list(zip(STEP, (1, 1, 2, 1), strict=True))
    text = run("show", *STEP_CALL).stdout
    assert [line.split(",")[0] for line in text.splitlines() if line.startswith("h200: ")] == [
        f"h200: {op}" for op in STEP
    ]
    assert text.count("config: M, N, H") == 1
    rendered = run_json("render", *STEP_CALL)["kernels"]
    assert [kernel["spec"]["op"] for kernel in rendered] == list(STEP)
    assert rendered[2]["source"] == render(DKDV_SPEC, dkdv_config(), H200).text
    source = run("render", *STEP_CALL).stdout
    assert source == "".join(kernel["source"] for kernel in rendered)
    ast.parse(source)


def test_render_takes_a_config_of_one_kernel_only() -> None:
    refused = run("render", *STEP_CALL, "--config", "{}")
    assert refused.exit_code == 2
    assert "--config is the config of one kernel: give its --op" in refused.stderr


def test_export_of_a_training_step(store: Store, tmp_path: Path) -> None:
    save_step(store)
    store.save(dkdv_record(1.0, place=dataclasses.replace(DKDV_PLACE, bucket=Bucket(64, 4096, 4096, 512))))
    result = run("export", *STEP_CALL, "-o", tmp_path / "step")
    assert result.exit_code == 0, result.output
    files = sorted(path.name.partition("_")[0] for path in (tmp_path / "step").glob("*.py"))
    assert files == sorted(STEP)  # and no other bucket
    assert result.stderr == ""


def test_export_writes_what_was_asked(store: Store, tmp_path: Path) -> None:
    store.save(make_record(200.0))
    store.save(make_record(100.0, place=dataclasses.replace(PLACE, bucket=Bucket(1024, 1, 8192))))
    usual = run("export", "--gpu", "h200", "--op", "decode", "-o", tmp_path / "usual")
    assert [path.name for path in (tmp_path / "usual").glob("*.py")] == ["decode_d128_bf16_g1_rows8_kv1024.py"]
    assert usual.stderr == (
        "without --shape this is batch 1, heads 8, seqlen 1x1024; --all writes every size with a record\n"
    )
    run("export", "--gpu", "h200", "--op", "decode", "--all", "-o", tmp_path / "all")
    assert len(list((tmp_path / "all").glob("*.py"))) == 2
    none = run("export", "--gpu", "h200", "--op", "forward", "--all", "-o", tmp_path / "none")
    assert none.stderr == "no size has a record, so this is batch 4, heads 16, seqlen 4096\n"
    for arguments in (("--all", *CALL), ("--all",)):
        refused = run("export", *arguments, "-o", tmp_path / "x")
        assert (refused.exit_code, (tmp_path / "x").exists()) == (2, False)
        assert "--all needs --op, and no --shape" in refused.stderr


def test_all_of_training_are_its_four_kernels(store: Store, tmp_path: Path) -> None:
    save_step(store)
    without_stats = dataclasses.replace(PLACES["forward"].spec, stats=False)
    store.save(
        make_record(
            1.0,
            place=Place("h200", without_stats, Bucket(1, 128, 128, 512)),
            config=default_of(PLACES["forward"], H200),
        )
    )
    result = run("export", *STEP_CALL[:8], "--all", "-o", tmp_path / "all")
    assert result.exit_code == 0, result.output
    assert sorted(path.name.partition("_")[0] for path in (tmp_path / "all").glob("*.py")) == sorted(STEP)


def test_a_models_kernels(store: Store, model: Path, tmp_path: Path) -> None:
    asked = ("--gpu", "h200", "--model", model, "--training")
    assert len(run_json("show", *asked)["kernels"]) == 4
    assert [kernel["spec"]["head_dim"] for kernel in run_json("render", *asked)["kernels"]] == [16] * 4
    listed = run_json("list", *asked)["records"]
    assert {(line["counts_as"], line["tier"], line["gain"]) for line in listed} == {("no results", "the default", None)}
    assert len(listed) == 4
    run("export", *asked, "-o", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.py"))) == 4
    text = run("list", *asked).stdout
    assert "h200: dkdv, head_dim 16, bf16, GQA 4:1, causal\n" in text
    assert "no results: 4\n" in text


@pytest.mark.parametrize("command", ["show", "explain", "render", "export"])
def test_it_must_be_clear_what_is_asked(command: str, model: Path, tmp_path: Path) -> None:
    output = ("-o", tmp_path / "out") * (command == "export")
    for arguments, message in (
        ((), ", or --model, or --for with --heads"),
        (("--shape", "1,8,1024"), ", or --model, or --for with --heads"),
        (("--model", model, "--op", "dkdv"), "leave out --op and --shape"),
        (("--model", model, "--shape", "1,8,1024"), "leave out --op and --shape"),
        (("--op", "training", "--shape", "1,8,1024", "--ragged"), "--ragged needs --op decode, not training"),
    ):
        refused = run(command, "--gpu", "h200", *arguments, *output)
        assert refused.exit_code == 2
        assert message in refused.stderr
        assert refused.stdout == ""


# list


def records(store: Store) -> list[Result]:
    save_step(store)
    store.save(make_record(100.0))
    store.save(make_record(90.0, place=dataclasses.replace(PLACE, bucket=Bucket(1024, 1, 8192))))
    store.save(
        make_record(
            80.0, place=dataclasses.replace(PLACE, bucket=Bucket(4096, 1, 16384)), evidence_changes=OTHER_TOOLCHAIN
        )
    )
    paged = dataclasses.replace(SPEC, op="decode_varlen", page_size=16)
    store.save(
        make_record(
            70.0,
            place=Place("h200", paged, Bucket(8, 1, 1024)),
            config=default_of(Place("h200", paged, Bucket(8, 1, 1024)), H200),
        )
    )
    return store.all()


def test_list_begins_with_a_summary(store: Store) -> None:
    records(store)
    text = run("list").stdout
    lines = [line.split() for line in text.partition("\n\n")[0].splitlines()]
    assert text.startswith("h200, places by where their config comes from\n")
    assert lines[1] == ["places", "here", "toolchain", "kernel"]
    assert ["3", "2", "1", "decode,", "head_dim", "128,", "bf16,", "GQA", "4:1"] in lines
    assert ["1", "1", "-", "preprocess,", "head_dim", "96,", "bf16"] in lines
    assert lines[-1] == ["8", "7", "1", "all", "kernels"]
    only = run("list", "--summary").stdout
    assert only.startswith(text.partition("\n\n")[0])
    assert "us" not in only.split()
    assert "places by" not in run("list", "--all").stdout
    for option in (("--tier", "here"), ("--summary",)):
        refused = run("list", "--all", *option)
        assert refused.exit_code == 2
        assert "leave out --tier and --summary" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "places"),
    [
        ((), 8),
        (("--op", "training"), 4),
        (("--op", "training", "--window", "512"), 4),
        (("--op", "training", "--window", "4096"), 1),  # preprocess, which has no window
        (("--window", "513"), 3),
        (("--op", "dkdv"), 1),
        (("--op", "decode"), 4),
        (("--op", "decode", "--ragged"), 1),
        (("--page-size", "16"), 1),
        (("--page-size", "32"), 0),
        (("--head-dim", "128"), 4),
        (("--dtype", "fp16"), 0),
        (("--stats",), 1),
        (("--full",), 5),
        (("--causal",), 3),
        (("--tier", "toolchain"), 1),
        (("--tier", "near"), 0),
        (("--op", "decode", "--shape", "30,32/8,8000"), 1),
        (("--op", "decode", "--shape", "30,32/32,8000"), 0),  # another group
        (("--shape", "2,32/8,4096"), 4),
        (("--op", "training", "--shape", "2,32/8,4096"), 4),
        (("--tier", "here", "--op", "decode"), 3),
    ],
)
def test_filters_of_list(arguments: tuple[str, ...], places: int, store: Store) -> None:
    records(store)
    assert len(run_json("list", *arguments)["records"]) == places
    if not places:
        assert "no results of these kernels and sizes" in run("list", *arguments).stdout


def test_list_of_a_card_has_what_it_borrows(store: Store) -> None:
    records(store)  # an H200's
    store.save(make_record(100.0, place=dataclasses.replace(PLACE, gpu="h100")))
    listed = run_json("list", "--gpu", "h100")["records"]
    tiers = Counter((line["of_place"]["spec.op"], line["tier"]) for line in listed)
    assert tiers == {  # preprocess does not borrow
        ("forward", "a sibling card"): 1,
        ("dkdv", "a sibling card"): 1,
        ("dqdr", "a sibling card"): 1,
        ("decode", "measured here"): 1,
        ("decode", "a sibling card"): 3,  # one of them with pages
    }
    assert {line["of_place"]["gpu"] for line in listed} == {"h100"}
    assert len(run_json("list", "--gpu", "h100", "--op", "forward", "--tier", "sibling")["records"]) == 1
    assert len(run_json("list", "--gpu", "h100", "--all")["records"]) == 1
    assert run_json("list", "--gpu", "a100")["records"] == []  # of another capability


def test_list_of_a_model_has_its_kernels_without_results(store: Store) -> None:
    save_step(store)
    arguments = ("--gpu", "h200", "--for", "training", "--heads", "32/8", "--head-dim", "96", "--batch", "2")
    listed = run_json("list", *arguments, "--window", "513")["records"]
    assert {line["tier"] for line in listed} == {"measured here"}
    (unknown,) = (line for line in run_json("list", *arguments)["records"] if line["of_place"]["spec.op"] == "dqdr")
    assert (unknown["tier"], unknown["counts_as"]) == ("the default", "no results")
    assert unknown["config"] == run_json("explain", *arguments)["steps"][0]["kernels"][3]["config"]


# buckets


@pytest.mark.parametrize("command", ["show", "explain", "render", "list"])
def test_a_shape_says_which_bucket_it_means(command: str, store: Store) -> None:
    said = run(command, "--gpu", "h200", "--op", "forward", "--shape", "1,8,5000").stderr
    assert said == (
        "--shape 1,8,5000 means the bucket batch x kv_heads 8, seqlen 4096, one config for batch x kv_heads 6 to 11, "
        "seqlen 2897 to 5792\n"
    )
    assert run(command, "--gpu", "h200", "--op", "forward", "--shape", "1,8,4096").stderr == ""
    assert (
        "1 query, 5793 to 11585 keys" in run(command, "--gpu", "h200", "--op", "decode", "--shape", "1,8,7000").stderr
    )


@pytest.mark.parametrize("command", ["show", "explain", "list", "render"])
def test_a_length_of_a_run_says_which_bucket_it_means(command: str, store: Store) -> None:
    def said(*arguments: str) -> list[str]:
        result = run(command, "--gpu", "h200", "--heads", "8", *arguments)
        assert result.exit_code == 0, result.output
        return [line for line in result.stderr.splitlines() if "means the bucket" in line]

    tokens = "--seqlen 5000 means the bucket of 4096 tokens, one config for 2897 to 5792 tokens"
    keys = "--max-len 5000 means the bucket of 4096 keys, one config for 2897 to 5792 keys"
    assert said("--for", "training", "--seqlen", "5000") == [tokens]
    assert said("--for", "training", "--for", "serving", "--seqlen", "5000", "--max-len", "5000") == [tokens, keys]
    assert said("--for", "training", "--seqlen", "4096") == []
    assert said("--for", "serving") == []


def test_a_length_in_pages_means_the_bucket_of_whole_pages(store: Store) -> None:
    serving = ("explain", "--gpu", "h200", "--for", "serving", "--heads", "8", "--max-len", "5790")
    assert "means the bucket of 4096 keys" in run(*serving).stderr
    assert (
        "means the bucket of 8192 keys, one config for 5793 to 11585 keys" in run(*serving, "--page-size", "64").stderr
    )


def test_a_shape_of_tune_says_which_bucket_it_means(fake_h200: None, store: Store) -> None:
    result = run("tune", "--op", "decode", "--op", "forward", "--shape", "1,8,5000", "--trials", "1", "--workers", "1")
    assert result.stderr.count("means the bucket") == 2
    assert {record.place.bucket for record in store.all()} == {Bucket(8, 4096, 4096), Bucket(8, 1, 4096)}


@pytest.mark.parametrize("of", [("--model",), ("--for", "training", "--for", "serving", "--heads", "8/2")])
def test_batch_invariant_kernels_of_a_model(of: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    """`explain`, `lock` and `export` take --batch-invariant with --model and --for; each place is locked once."""
    asked = (*of, str(model)) if of == ("--model",) else (*of, "--window", "100")
    options = ("--gpu", "h200", *asked, "--batch-invariant", "--max-len", "512", "--seqlen", "512")
    steps = run_json("explain", *options, "--json")["steps"]
    specs = [kernel["spec"] for step in steps for kernel in step["kernels"]]
    assert specs
    assert all(spec["batch_invariant"] for spec in specs)
    assert {spec["op"] for spec in specs} == {"forward", "preprocess", "dkdv", "dqdr", "decode"}
    assert all(spec["ragged"] for spec in specs if spec["op"] == "decode")
    run("lock", *options, "-o", str(tmp_path / "kernels.lock"))
    places = [json.loads(line)["place"] for line in (tmp_path / "kernels.lock").read_text("utf-8").splitlines()[1:]]
    assert len(places) == 6  # four of training, decode and chunks
    run("export", *options, "-o", str(tmp_path / "kernels"))
    assert len(list((tmp_path / "kernels").glob("*.py"))) >= len(places)
