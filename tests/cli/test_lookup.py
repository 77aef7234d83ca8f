"""list, show and explain, over results made by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from cli_samples import (
    CALL,
    DKDV_CALL,
    DKDV_PLACE,
    DKDV_SPEC,
    H200,
    OTHER_KERNEL,
    OTHER_TOOLCHAIN,
    PLACE,
    SPEC,
    config,
    known,
    known_dkdv,
    process,
    run,
    run_json,
)

from parallax_gen.codegen.render import render
from parallax_gen.codegen.resources import Resources
from parallax_gen.memory.guard import keep
from parallax_gen.memory.shipped import write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.problem.config import DkDvConfig, config_to_dict
from parallax_gen.problem.heuristics import default_config
from parallax_gen.problem.shapes import Bucket, Shape

HERE = Toolchain.here()
TRITON_HERE = minor(HERE.triton)
OTHER_BUCKET = dataclasses.replace(PLACE, bucket=Bucket(1024, 1, 8192))  # not near
SIBLING = dataclasses.replace(PLACE, gpu="h100")

# list


def test_list_of_nothing() -> None:
    assert "nothing is known yet" in run("list").stdout
    assert run_json("list") == {"records": []}


def test_list_has_the_best_of_each_place(store: Store) -> None:
    for result in (known(250.0), known(240.0, splits=1), known(None, "wrong", splits=3), known(90.0, "predicted", 4)):
        store.record(result)
    records = run_json("list")["records"]
    assert [(r["config"]["NUM_SPLITS"], r["outcome"], r["origin"], r["used"]) for r in records] == [
        (1, "ok", "yours", True)
    ]
    assert records[0]["rate"] == pytest.approx(4477, rel=0.01)
    assert records[0]["rate_unit"] == "GB/s"
    assert len(run_json("list", "--all")["records"]) == 4
    assert run_json("list", "--op", "forward") == run_json("list", "--gpu", "h100") == {"records": []}
    table = run("list", "--gpu", "H200").stdout
    assert "h200: decode, head_dim 128, bf16, GQA 4:1" in table
    assert "N32 H8 S1 w1 s4  measured" in table
    assert "S2" not in table


def test_list_marks_what_is_unused_and_what_ships(store: Store) -> None:
    store.record(known(100.0, unlike=OTHER_KERNEL))
    store.record(known(300.0, "predicted", place=OTHER_BUCKET))
    write_shipped([known(250.0)], "h200")
    records = run_json("list")["records"]
    assert sorted((r["origin"], r["outcome"], r["used"], r["counts_as"]) for r in records) == [
        ("shipped", "ok", True, "this Triton"),
        ("yours", "predicted", True, "never measured"),
    ]
    lines = run("list").stdout.splitlines()
    assert any(line.endswith("shipped    this Triton") for line in lines)
    assert any(line.endswith("predicted  never measured") for line in lines)
    assert {"this Triton: 1, never measured: 1", "never measured: 1, this Triton: 1"} & set(lines)
    table = run("list", "--all").stdout
    assert table.index("another kernel than today's\n") < table.index("shipped") < table.index("predicted")


def test_list_says_what_a_call_rests_on(store: Store) -> None:
    """Of each place the record that a call gets, be it of another toolchain or of a sibling card."""
    longer = dataclasses.replace(PLACE, bucket=Bucket(4096, 1, 8192))
    store.record(known(100.0, unlike=OTHER_TOOLCHAIN))
    store.record(known(110.0, splits=3, unlike=OTHER_TOOLCHAIN))
    store.record(known(200.0, place=dataclasses.replace(SIBLING, bucket=OTHER_BUCKET.bucket)))
    store.record(known(None, "wrong", splits=3, place=OTHER_BUCKET))
    store.record(known(50.0, place=longer, unlike=OTHER_KERNEL))
    records = run_json("list", "--gpu", "h200")["records"]
    assert [(r["time_us"], r["place"]["gpu"], r["of_place"]["gpu"], r["counts_as"], r["used"]) for r in records] == [
        (100.0, "h200", "h200", "Triton 3.5", False),
        (200.0, "h100", "h200", "this Triton on h100", True),
        (50.0, "h200", "h200", "not used", False),
    ]
    table = run("list", "--gpu", "h200").stdout
    assert "measured  Triton 3.5\n" in table
    assert "measured  this Triton on h100\n" in table
    assert "measured  not used\n" in table


def test_list_says_what_is_gained_over_the_default(store: Store) -> None:
    """Of each place by its own toolchain and card."""
    default = default_config(SPEC, Shape(32, 32, 8, 1, 8192), H200)
    assert default not in (config(2), config(3))
    store.record(known(100.0))
    store.record(known(112.0, config=default))
    store.record(known(200.0, place=OTHER_BUCKET))
    store.record(known(150.0, place=OTHER_BUCKET, config=default, unlike=OTHER_TOOLCHAIN))
    store.record(known(None, "wrong", splits=3))
    records = run_json("list")["records"]
    assert [(r["time_us"], r["default_us"], r["gain"]) for r in records] == [(100.0, 112.0, 1.12), (200.0, None, None)]
    lines = run("list").stdout.splitlines()
    assert [line.split()[4] for line in lines[1:4]] == ["gain", "1.12x", "-"]
    every = {(r["time_us"], r["gain"]) for r in run_json("list", "--all")["records"]}
    assert every == {(100.0, 1.12), (112.0, 1.0), (None, None), (200.0, None), (150.0, 1.0)}


def test_list_compares_a_sibling_cards_record_with_the_default_there(store: Store) -> None:
    default = default_config(SPEC, Shape(32, 32, 8, 1, 8192), H200)
    store.record(known(100.0, place=SIBLING))
    store.record(known(130.0, place=SIBLING, config=default))
    store.record(known(50.0, unlike=OTHER_KERNEL))
    store.record(known(60.0, unlike=OTHER_KERNEL, config=default))
    (record,) = run_json("list", "--gpu", "h200")["records"]
    assert (record["place"]["gpu"], record["default_us"], record["gain"]) == ("h100", 130.0, 1.3)
    gains = [r["gain"] for r in run_json("list", "--all", "--gpu", "h200")["records"]]
    assert gains == [None, None]  # of kernels that no call gets


def test_tables_fit_and_have_no_colours(store: Store) -> None:
    store.record(known(123456.7, splits=128))
    store.record(known(12345.6, splits=96, registers=255, spills=1024, shared_bytes=232448, error=1e-3))
    store.record(known(None, "compile", splits=1, detail="[red]a detail[/red]"))
    for command in (("list", "--all"), ("show", *CALL)):
        out = run(*command).stdout
        tables = [line for line in out.splitlines() if " w1 s4" in line and "registers" not in line]
        assert tables
        assert max(map(len, tables)) <= 80
        assert "\x1b" not in out
    assert "    [red]a detail[/red]\n" in run("show", *CALL).stdout


def test_list_of_kernels_with_flags_and_without(store: Store) -> None:
    """Records lack the fields that are at their default: what they are sorted and grouped by is all there."""
    spec, bucket = dataclasses.replace(DKDV_SPEC, window=False), Bucket(1, 1, 128)
    whole = dataclasses.replace(DKDV_PLACE, spec=spec, bucket=bucket)
    packed = dataclasses.replace(DKDV_PLACE, spec=dataclasses.replace(DKDV_SPEC, varlen=True))
    longer = dataclasses.replace(whole, bucket=Bucket(1, 1, 256))
    for place in (whole, DKDV_PLACE, packed, longer):
        store.record(known_dkdv(place=place))
    text = run("list").stdout
    titles = [line for line in text.splitlines() if line.startswith("h200: ")]
    kernel = "h200: dkdv, head_dim 96, bf16, GQA 4:1, "
    assert sorted(titles) == [f"{kernel}{flags}" for flags in ("causal", "window", "window, varlen")]
    assert "4096 W512" in text
    assert "M64 N128 G4 w8 s2 pieces  measured" in text
    assert run_json("list")["records"][0]["rate_unit"] == "TFLOP/s"


# show


def test_show_has_everything_of_one_place(store: Store) -> None:
    timed = [known(250.0, error=2e-3), known(240.0, splits=1), known(90.0, "predicted", splits=4)]
    failed = [
        known(None, "wrong", splits=3, detail="row 7 is NaN", error=math.inf),
        known(None, "resources", splits=6, detail="spills 900 bytes"),
        known(900.0, "slow", splits=8),
    ]
    for result in [*timed, *failed, known(1.0, place=OTHER_BUCKET)]:
        store.record(result)
    lines = run("show", *CALL).stdout.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["240.0", "250.0", "90.00"]
    assert "2.0e-03" in lines[3]
    text = "\n".join(lines[5:])
    assert "wrong: N32 H8 S3 last w1 s4; 168 registers, 0 bytes spilled, - shared, error inf\n    row 7 is NaN" in text
    assert "spills 900 bytes" in text
    assert "slow: N32 H8 S8 last w1 s4" in text
    records = run_json("show", *CALL)["results"]
    assert len(records) == 6
    assert next(r for r in records if r["outcome"] == "wrong")["error"] is None  # JSON has no infinity


def test_show_says_of_each_result_what_is_not_as_here(store: Store) -> None:
    store.record(known(100.0, unlike=OTHER_TOOLCHAIN))
    store.record(known(120.0, unlike=OTHER_KERNEL))
    store.record(known(130.0))
    store.record(known(140.0, place=SIBLING))
    lines = run("show", *CALL).stdout.splitlines()
    assert lines[2].endswith(f"measured  triton 3.5 (here {TRITON_HERE}), cuda 12.8 (here {HERE.cuda})")
    assert lines[3].endswith("measured  another kernel than today's")
    assert lines[4].endswith("  measured")
    assert len(run_json("show", *CALL)["results"]) == 3  # of this card


def test_show_of_nothing() -> None:
    assert "nothing is known of this place" in run("show", *CALL).stdout
    assert run_json("show", *CALL)["results"] == []


def test_show_of_a_kernel_with_a_window(store: Store) -> None:
    store.record(known_dkdv())
    store.record(known_dkdv(None, "crash", stages=3, detail="exit status -11"))
    store.record(known_dkdv(1.0, place=dataclasses.replace(DKDV_PLACE, bucket=Bucket(16, 4096, 4096, 1024))))
    text = run("show", *DKDV_CALL).stdout
    assert text.startswith("h200: dkdv, head_dim 96, bf16, GQA 4:1, window; 16 kv rows, seqlen 4096, window 512\n")
    assert "M64 N128 G4 w8 s2 pieces  measured" in text
    assert "crash: M64 N128 G4 w8 s3 pieces" in text
    found = run_json("show", *DKDV_CALL)
    assert len(found["results"]) == 2
    assert found["place"]["bucket.window"] == 512


# explain


def test_explain_a_default_that_nothing_is_known_of() -> None:
    found = run_json("explain", *CALL)
    assert found["from"] == "default"
    assert found["record"] is None
    assert found["reason"] == "nothing is known of this place"
    assert found["tier"] == "the default"
    assert found["unused"] == found["runners_up"] == found["predicted"] == []
    assert "from    the default config: nothing is known" in run("explain", *CALL).stdout


def test_explain_a_record_and_its_runners_up(store: Store) -> None:
    for splits in (1, 2, 3, 4, 6):
        store.record(known(200.0 + splits, splits=splits))
    store.record(known(90.0, "predicted", splits=8))
    found = run_json("explain", *CALL)
    assert found["from"] == "yours"
    assert found["config"] == config_to_dict(config(1))
    assert Path(found["file"]).read_text(encoding="utf-8") == render(SPEC, config(1), H200).text
    assert found["tier"] == "measured here"
    assert [r["record"]["time_us"] for r in found["runners_up"]] == [202.0, 203.0, 204.0]
    assert {r["tier"] for r in found["runners_up"]} == {"measured here"}
    assert [r["time_us"] for r in found["predicted"]] == [90.0]
    text = run("explain", *CALL).stdout
    assert f"from    your record, the fastest of 5 measured of this kernel with {HERE}:" in text
    assert "2026-01-01" in text
    assert "only predicted, so not used\n  BLOCK_N=32 BLOCK_H=8 NUM_SPLITS=8" in text


def test_explain_a_shipped_record() -> None:
    write_shipped([known(250.0)], "h200")
    assert run_json("explain", *CALL)["from"] == "shipped"
    assert (
        f"from    a shipped record, the only one measured of this kernel with {HERE}:" in run("explain", *CALL).stdout
    )


def test_explain_a_record_of_another_toolchain(store: Store) -> None:
    store.record(known(110.0, unlike=OTHER_TOOLCHAIN))
    store.record(known(100.0, splits=3, unlike=OTHER_TOOLCHAIN))
    found = run_json("explain", *CALL)
    assert (found["from"], found["tier"]) == ("yours", "another toolchain")
    assert found["config"] == config_to_dict(config(3))
    assert found["record"]["unlike_here"] == [f"triton 3.5 (here {TRITON_HERE})", f"cuda 12.8 (here {HERE.cuda})"]
    text = run("explain", *CALL).stdout
    told = f"the fastest of 2 with Triton 3.5, ptxas 12.8; nothing that counts was measured with {HERE}:"
    assert f"from    your record, {told}\n" in text
    assert "runners-up" in text
    assert "110.0 us" in text.partition("runners-up")[2]
    assert text.endswith("measured, Triton 3.5\n")
    store.record(known(90.0, splits=6, unlike={"triton": "3.4"}, created_at="2025-06-01T00:00:00+00:00"))
    assert f"from    your record, {told}\n" in run("explain", *CALL).stdout  # an older one's time is not compared
    store.record(known(300.0, splits=4))
    found = run_json("explain", *CALL)
    assert (found["tier"], found["record"]["time_us"]) == ("measured here", 300.0)
    assert [(r["tier"], r["record"]["time_us"]) for r in found["runners_up"]] == [
        ("another toolchain", 100.0),
        ("another toolchain", 110.0),
        ("another toolchain", 90.0),
    ]
    assert found["unused"] == []


def test_explain_a_sibling_cards_record(store: Store) -> None:
    store.record(known(100.0, splits=3, place=SIBLING))
    store.record(known(50.0, place=SIBLING, unlike=OTHER_KERNEL))
    found = run_json("explain", *CALL)
    assert (found["from"], found["tier"]) == ("yours", "a sibling card")
    assert found["config"] == config_to_dict(config(3))
    text = run("explain", *CALL).stdout
    told = f"the only one with {HERE} on h100, a card of the same capability"
    assert f"from    your record, {told}; nothing that counts was measured on this one:\n" in text
    store.record(known(200.0, unlike=OTHER_TOOLCHAIN))
    assert run_json("explain", *CALL)["tier"] == "another toolchain"
    assert text_of_runners_up().endswith("measured, this Triton on h100\n")


def text_of_runners_up() -> str:
    return run("explain", *CALL).stdout.partition("runners-up\n")[2]


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({"cuda": "11.8"}, f"cuda 11.8 (here {HERE.cuda})"),
        ({"cuda": ""}, f"cuda unknown (here {HERE.cuda})"),  # from before it was recorded
        ({"protocol": 7, "triton": "3.4"}, f"triton 3.4 (here {TRITON_HERE}), protocol 7 (here 1)"),
        (OTHER_KERNEL, "another kernel than today's"),
        (OTHER_KERNEL | {"triton": "3.4"}, f"another kernel than today's, triton 3.4 (here {TRITON_HERE})"),
        ({"kernel": "", "text": "", "templates": "0" * 12}, "another kernel than today's"),
    ],
)
def test_show_says_what_of_the_evidence_differs(store: Store, there: dict[str, object], told: str) -> None:
    store.record(known(100.0, unlike=there))
    assert f"measured  {told}\n" in run("show", *CALL).stdout
    (found,) = run_json("show", *CALL)["results"]
    assert ", ".join(found["unlike_here"]) == told
    assert not found["used"]


def test_explain_what_was_measured_of_another_kernel(store: Store) -> None:
    store.record(known(100.0, unlike=OTHER_KERNEL))
    store.record(known(120.0, splits=3, unlike=OTHER_KERNEL))
    found = run_json("explain", *CALL)
    assert (found["from"], found["runners_up"]) == ("default", [])
    assert found["reason"] == "of 2 records none counts: another kernel than today's"
    assert [(u["why"], u["record"]["time_us"]) for u in found["unused"]] == [
        ("another kernel than today's", 100.0),
        ("another kernel than today's", 120.0),
    ]
    text = run("explain", *CALL).stdout
    assert "from    the default config: of 2 records none counts: another kernel than today's\n" in text
    assert "\nmeasured, and not used\n" in text


def test_explain_a_search_from_before_a_knob_that_the_default_uses(store: Store) -> None:
    before = DkDvConfig(64, 128, HEAD_GROUP=4, num_warps=8, num_stages=2)  # whose HEAD_DIM_AS is "whole"
    place = dataclasses.replace(DKDV_PLACE, spec=dataclasses.replace(DKDV_SPEC, head_dim=128))
    call = [*DKDV_CALL[:4], "--head-dim", "128", *DKDV_CALL[6:]]
    default = default_config(place.spec, Shape(2, 32, 8, 4096, 4096, 512), H200)
    assert isinstance(default, DkDvConfig)
    assert default.MASK != "weights" or default.ROW_NUMBERS != "apart" or default.maxnreg, "the test is of another"
    store.record(known_dkdv(500.0, config=before, place=place))
    found = run_json("explain", *call)
    assert found["tier"] == "the default"
    assert found["reason"] == "the only record does not count: its search did not know a knob that today's default uses"
    store.record(known_dkdv(600.0, config=default, place=place))
    assert run_json("explain", *call)["config"] == config_to_dict(before)


def test_explain_does_not_look_at_other_buckets(store: Store) -> None:
    store.record(known(50.0, place=OTHER_BUCKET))
    found = run_json("explain", *CALL)
    assert (found["from"], found["reason"], found["unused"]) == ("default", "nothing is known of this place", [])


def test_explain_a_near_bucket(store: Store) -> None:
    near = dataclasses.replace(PLACE, bucket=Bucket(256, 1, 16384))
    store.record(known(50.0, place=near))
    found = run_json("explain", *CALL)
    assert (found["from"], found["tier"], found["checked"], found["refused"]) == ("yours", "a near bucket", False, [])
    text = run("explain", *CALL).stdout
    assert f"the best measured with {Toolchain.here()} at 256 kv rows, seqlen 1x16384; nothing that counts" in text
    assert "not yet checked: a first call compiles it here" in text


def test_explain_what_compiles_badly_here(store: Store) -> None:
    store.record(known(50.0, splits=3, unlike=OTHER_TOOLCHAIN))
    store.record(known(60.0, splits=4, unlike=OTHER_TOOLCHAIN))
    for splits, spills in ((3, 500), (4, 0)):
        keep(render(SPEC, config(splits), H200), H200, Resources(255, spills, 1000))
    found = run_json("explain", *CALL)
    assert (found["record"]["time_us"], found["checked"], found["refused"]) == (50.0, False, [])
    text = run("explain", *CALL).stdout
    assert "not yet checked: a first call compiles it here, and drops it where it spills far more" in text
    default = default_config(SPEC, Shape(32, 32, 8, 1, 8192), H200)
    keep(render(SPEC, default, H200), H200, Resources(255, 16, 1000))
    found = run_json("explain", *CALL)
    assert (found["record"]["time_us"], found["checked"]) == (60.0, True)
    assert [(r["config"]["NUM_SPLITS"], r["why"]) for r in found["refused"]] == [
        (3, "it spills 500 bytes a thread as compiled here, the default 16")
    ]
    assert "\nnot     BLOCK_N=32" in run("explain", *CALL).stdout
    keep(render(SPEC, config(4), H200), H200, Resources(255, 500, 1000))
    assert run_json("explain", *CALL)["reason"] == "what is borrowed elsewhere compiles badly here"


def test_explain_what_was_only_predicted_or_failed(store: Store) -> None:
    store.record(known(90.0, "predicted"))
    store.record(known(None, "wrong", splits=3))
    found = run_json("explain", *CALL)
    assert found["from"] == "default"
    assert found["reason"] == "nothing was measured of this place, only: 1 predicted, 1 wrong"


def test_explain_a_record_that_is_not_valid_any_more(store: Store) -> None:
    store.record(known(90.0, splits=5))  # no value of the knob
    found = run_json("explain", *CALL)
    assert found["from"] == "default"
    assert found["reason"].startswith("the only record does not count: not valid any more: NUM_SPLITS is 5")


def test_explain_a_kernel_with_a_window(store: Store) -> None:
    other = dataclasses.replace(DKDV_PLACE, bucket=Bucket(16, 4096, 4096, 1024))
    store.record(known_dkdv(500.0, place=other))
    text = run("explain", *DKDV_CALL).stdout
    assert "seqlen 4096, window 513; on h200" in text
    assert "from    the default config: nothing is known" in text
    unwindowed = [*DKDV_CALL[:6], *DKDV_CALL[8:]]
    assert "from    the default config: nothing is known" in run("explain", *unwindowed).stdout  # another kernel
    store.record(known_dkdv(900.0))
    found = run_json("explain", *DKDV_CALL)
    assert found["from"] == "yours"
    assert found["shape"]["window"] == 513
    assert found["record"]["rate"] == pytest.approx(
        2 * 6 * 2 * 32 * 96 * (4096**2 / 2 - (4096 - 512) ** 2 / 2) / 900.0 / 1e6
    )  # at the bucket's own sizes
    assert Path(found["file"]).read_text(encoding="utf-8") == render(DKDV_SPEC, known_dkdv().config, H200).text


@pytest.mark.parametrize("op", ["forward", "preprocess", "dkdv", "dqdr", "decode"])
def test_explain_has_an_answer_for_every_op(op: str) -> None:
    found = run_json("explain", "--gpu", "h200", "--op", op, "--head-dim", "64", "--shape", "2,32/8,4096")
    assert found["spec"]["op"] == op
    assert found["bucket"]["kv_rows"] == (64 if op == "preprocess" else 16)


def test_json_is_one_document_in_a_real_pipe(store: Store) -> None:
    store.record(known(250.0))
    out, err = process("-m", "parallax_gen.cli", "show", *CALL, "--json").communicate(timeout=60)
    assert 250.0 in [record["time_us"] for record in json.loads(out)["results"]]  # beside what really ships
    assert err == ""
