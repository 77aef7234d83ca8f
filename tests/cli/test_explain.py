"""explain, on hand-made records."""

from __future__ import annotations

import dataclasses
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
    dkdv_record,
    make_record,
    run,
    run_json,
)

from parallax_gen.codegen.render import render
from parallax_gen.codegen.resources import Resources
from parallax_gen.memory.guard import cache_resources
from parallax_gen.memory.place import Place
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.ops.base import config_to_dict
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.space import default_config
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import KernelSpec

HERE = Toolchain.here()
TRITON_HERE = minor(HERE.triton)
OTHER_BUCKET = dataclasses.replace(PLACE, bucket=Bucket(1024, 1, 8192))  # not near
SIBLING = dataclasses.replace(PLACE, gpu="h100")


def test_explain_a_default_without_records() -> None:
    result = run_json("explain", *CALL)
    assert result["from"] == "default"
    assert result["record"] is None
    assert result["reason"] == "this kernel and bucket have no records"
    assert result["tier"] == "the default"
    assert result["unused"] == result["runners_up"] == result["predicted"] == []
    assert "from    the default config: this kernel and bucket have no records" in run("explain", *CALL).stdout


def test_explain_a_record_and_its_runners_up(store: Store) -> None:
    for splits in (1, 2, 3, 4, 6):
        store.save(make_record(200.0 + splits, splits=splits))
    store.save(make_record(90.0, "predicted", splits=8))
    result = run_json("explain", *CALL)
    assert result["from"] == "yours"
    assert result["config"] == config_to_dict(config(1))
    assert Path(result["file"]).read_text(encoding="utf-8") == render(SPEC, config(1), H200).text
    assert result["tier"] == "measured here"
    assert [r["record"]["time_us"] for r in result["runners_up"]] == [202.0, 203.0, 204.0]
    assert {r["tier"] for r in result["runners_up"]} == {"measured here"}
    assert [r["time_us"] for r in result["predicted"]] == [90.0]
    text = run("explain", *CALL).stdout
    assert f"from    your record, the fastest of 5 configs measured with {HERE}:" in text
    assert "2026-01-01" in text
    assert "only predicted, so not used\n  BLOCK_N=32 BLOCK_H=8 NUM_SPLITS=8" in text


def test_explain_a_shipped_record() -> None:
    write_shipped([make_record(250.0)], "h200")
    assert run_json("explain", *CALL)["from"] == "shipped"
    assert f"from    a shipped record, the only config measured with {HERE}:" in run("explain", *CALL).stdout


def test_explain_a_record_of_another_toolchain(store: Store) -> None:
    store.save(make_record(110.0, evidence_changes=OTHER_TOOLCHAIN))
    store.save(make_record(100.0, splits=3, evidence_changes=OTHER_TOOLCHAIN))
    result = run_json("explain", *CALL)
    assert (result["from"], result["tier"]) == ("yours", "another toolchain")
    assert result["config"] == config_to_dict(config(3))
    assert result["record"]["unlike_here"] == [f"triton 3.4 (here {TRITON_HERE})", f"cuda 12.4 (here {HERE.cuda})"]
    text = run("explain", *CALL).stdout
    message = (
        f"the fastest of 2 configs measured with Triton 3.4, ptxas 12.4; no usable record was measured with {HERE}:"
    )
    assert f"from    your record, {message}\n" in text
    assert "runners-up" in text
    assert "110.0 us" in text.partition("runners-up")[2]
    assert text.endswith("measured, Triton 3.4\n")
    store.save(make_record(90.0, splits=6, evidence_changes={"triton": "3.4"}, created_at="2025-06-01T00:00:00+00:00"))
    assert f"from    your record, {message}\n" in run("explain", *CALL).stdout  # an older one's time is not compared
    store.save(make_record(300.0, splits=4))
    result = run_json("explain", *CALL)
    assert (result["tier"], result["record"]["time_us"]) == ("measured here", 300.0)
    assert [(r["tier"], r["record"]["time_us"]) for r in result["runners_up"]] == [
        ("another toolchain", 100.0),
        ("another toolchain", 110.0),
        ("another toolchain", 90.0),
    ]
    assert result["unused"] == []


def test_explain_a_sibling_cards_record(store: Store) -> None:
    store.save(make_record(100.0, splits=3, place=SIBLING))
    store.save(make_record(50.0, place=SIBLING, evidence_changes=OTHER_KERNEL))
    result = run_json("explain", *CALL)
    assert (result["from"], result["tier"]) == ("yours", "a sibling card")
    assert result["config"] == config_to_dict(config(3))
    text = run("explain", *CALL).stdout
    message = f"the only config measured with {HERE} on h100, a card of the same capability"
    assert f"from    your record, {message}; no usable record was measured on this card:\n" in text
    store.save(make_record(200.0, evidence_changes=OTHER_TOOLCHAIN))
    assert run_json("explain", *CALL)["tier"] == "another toolchain"
    assert text_of_runners_up().endswith("measured, this Triton on h100\n")


def text_of_runners_up() -> str:
    return run("explain", *CALL).stdout.partition("runners-up\n")[2]


def test_explain_a_record_of_another_kernel(store: Store) -> None:
    store.save(make_record(100.0, evidence_changes=OTHER_KERNEL))
    store.save(make_record(120.0, splits=3, evidence_changes=OTHER_KERNEL))
    result = run_json("explain", *CALL)
    assert (result["from"], result["runners_up"]) == ("default", [])
    assert result["reason"] == "none of 2 records is used: another kernel than today's"
    assert [(u["why"], u["record"]["time_us"]) for u in result["unused"]] == [
        ("another kernel than today's", 100.0),
        ("another kernel than today's", 120.0),
    ]
    text = run("explain", *CALL).stdout
    assert "from    the default config: none of 2 records is used: another kernel than today's\n" in text
    assert "\nmeasured, but not used\n" in text


def test_explain_a_search_older_than_a_knob_of_the_default(store: Store) -> None:
    before = DkDvConfig(
        64, 128, GROUP_HEADS=4, num_warps=8, num_stages=2, LOADS="descriptors"
    )  # whose HEAD_DIM_LAYOUT is "native"
    place = dataclasses.replace(DKDV_PLACE, spec=dataclasses.replace(DKDV_SPEC, head_dim=128))
    call = [*DKDV_CALL[:4], "--head-dim", "128", *DKDV_CALL[6:]]
    default = default_config(place.spec, Shape(2, 32, 8, 4096, 4096, 512), H200)
    assert isinstance(default, DkDvConfig)
    assert default.MASK != "after_exp" or default.ROW_STATS != "separate" or default.maxnreg, "the test is of another"
    store.save(dkdv_record(500.0, config=before, place=place))
    result = run_json("explain", *call)
    assert result["tier"] == "the default"
    assert (
        result["reason"]
        == "the only record is not used: its search did not try MASK=before_exp, which today's default has"
    )
    store.save(dkdv_record(600.0, config=default, place=place))
    assert run_json("explain", *call)["config"] == config_to_dict(before)


WINDOWED = Place("h200", KernelSpec("forward", 128, "bf16", causal=True, window=True), Bucket(8, 4096, 4096, 1024))
WINDOWED_CALL = ("--gpu", "h200", "--op", "forward", "--window", "1024", "--shape", "1,8,4096")


def windowed(time_us: float, row_max: str, gpu: str = "h200", day: int = 1) -> Result:
    """A result of today's toolchain for the default config with another SOFTMAX."""
    default = default_config(WINDOWED.spec, Shape(1, 8, 8, 4096, 4096, 1024), H200)
    assert isinstance(default, ForwardConfig)
    assert default.SOFTMAX == "online", "the test is of another"
    place, created_at = dataclasses.replace(WINDOWED, gpu=gpu), f"2026-01-{day:02}T00:00:00+00:00"
    return make_record(
        time_us, place=place, config=dataclasses.replace(default, SOFTMAX=row_max), created_at=created_at
    )


def test_explain_a_search_older_than_a_knob_of_the_sibling_cards_best(store: Store) -> None:
    store.merge([windowed(500.0, "online"), windowed(900.0, "fixed_reference", "h100", day=2)])
    result = run_json("explain", *WINDOWED_CALL)
    assert (result["tier"], result["record"]["time_us"]) == ("a sibling card", 900.0)
    why = "its search did not try SOFTMAX=fixed_reference, which the best of a newer search on h100 has"
    assert [(u["record"]["time_us"], u["why"]) for u in result["unused"]] == [(500.0, why)]
    of = f"the only config measured with {HERE} on h100, a card of the same capability"
    assert result["reason"] == f"{of}; the only record on this card is not used: {why}"
    assert f"from    your record, {result['reason']}:\n" in run("explain", *WINDOWED_CALL).stdout


def test_explain_a_record_of_another_timing_protocol(store: Store) -> None:
    store.save(make_record(100.0, evidence_changes={"protocol": 0}))
    store.save(make_record(90.0, splits=3, evidence_changes={"protocol": 0}))
    result = run_json("explain", *CALL)
    assert result["reason"] == (
        f"the fastest of 2 configs measured with {HERE} by timing protocol 0 (today's is 1); "
        "no record has today's timing protocol, and times of different protocols are not compared"
    )
    store.save(make_record(80.0, splits=4, evidence_changes=OTHER_KERNEL))
    assert run_json("explain", *CALL)["reason"].endswith(
        f"the only record with {HERE} is not used: another kernel than today's"
    )
    store.save(make_record(200.0, splits=6))
    assert run_json("explain", *CALL)["reason"] == f"the only config measured with {HERE}"
    assert "measured, this Triton, protocol 0\n" in text_of_runners_up()
    assert "this Triton, protocol 0" not in run("list").stdout  # list shows what calls get


def test_times_of_two_protocols_are_not_compared(store: Store) -> None:
    for splits, protocol in ((1, 0), (2, 7), (3, 7)):
        created_at = f"2026-01-{1 + protocol:02}T00:00:00+00:00"
        evidence_changes = OTHER_TOOLCHAIN | {"protocol": protocol}
        store.save(make_record(100.0 + splits, splits=splits, evidence_changes=evidence_changes, created_at=created_at))
    reason = run_json("explain", *CALL)["reason"]
    assert reason.startswith(
        "the fastest of 2 configs measured with Triton 3.4, ptxas 12.4 by timing protocol 7 (today's is 1); "
    )
    assert reason.endswith(f"; no usable record was measured with {HERE}")


def test_explain_records_that_failed_or_were_timed_again_here(store: Store) -> None:
    store.save(make_record(100.0, evidence_changes=OTHER_TOOLCHAIN))
    store.save(make_record(None, "wrong"))
    result = run_json("explain", *CALL)
    assert (result["tier"], result["reason"]) == (
        "the default",
        "the only record is not used: its kernel failed here: wrong",
    )
    again = {"triton": f"{TRITON_HERE}.99"}
    store.save(make_record(50.0, splits=3))
    store.save(make_record(70.0, splits=3, evidence_changes=again, created_at="2026-02-01T00:00:00+00:00"))
    result = run_json("explain", *CALL)
    assert result["record"]["time_us"] == 70.0
    whys = {u["record"]["time_us"]: u["why"] for u in result["unused"]}
    assert whys[50.0] == "its kernel was timed again: 70.0 us, 2026-02-01T00:00:00+00:00"


def test_explain_ignores_other_buckets(store: Store) -> None:
    store.save(make_record(50.0, place=OTHER_BUCKET))
    result = run_json("explain", *CALL)
    assert (result["from"], result["reason"], result["unused"]) == (
        "default",
        "this kernel and bucket have no records",
        [],
    )


def test_explain_a_near_bucket(store: Store, tmp_path: Path) -> None:
    near = dataclasses.replace(PLACE, bucket=Bucket(256, 1, 16384))
    default = default_config(SPEC, Shape(32, 32, 8, 1, 8192), H200)
    for us, warps in ((50.0, 2), (51.0, 1), (60.0, 4)):
        store.save(make_record(us, place=near, config=dataclasses.replace(default, num_warps=warps)))
    result = run_json("explain", *CALL)
    assert result["config"] == config_to_dict(default)
    assert (result["from"], result["tier"], result["checked"], result["refused"]) == (
        "yours",
        "a near bucket",
        True,
        [],
    )
    text = run("explain", *CALL).stdout
    best = f"the default, at most 3% slower than the fastest config measured with {Toolchain.here()}"
    assert f"{best} at batch x kv_heads 256, seqlen 1x16384; no usable record" in text
    exported = " ".join(run("export", *CALL, "-o", tmp_path / "kernels").stdout.split())
    assert "the default config, by your record, measured on h200 at batch x kv_heads 256, seqlen 1x16384;" in exported


def test_explain_a_record_that_spills_here(store: Store) -> None:
    store.save(make_record(50.0, splits=3, evidence_changes=OTHER_TOOLCHAIN))
    store.save(make_record(60.0, splits=4, evidence_changes=OTHER_TOOLCHAIN))
    for splits, spills in ((3, 500), (4, 0)):
        cache_resources(render(SPEC, config(splits), H200), H200, Resources(255, spills, 1000))
    result = run_json("explain", *CALL)
    assert (result["record"]["time_us"], result["checked"], result["refused"]) == (50.0, False, [])
    text = run("explain", *CALL).stdout
    assert "not yet checked: a first call compiles it here, and drops it if it spills far more" in text
    default = default_config(SPEC, Shape(32, 32, 8, 1, 8192), H200)
    cache_resources(render(SPEC, default, H200), H200, Resources(255, 16, 1000))
    result = run_json("explain", *CALL)
    assert (result["record"]["time_us"], result["checked"]) == (60.0, True)
    assert [(r["config"]["NUM_SPLITS"], r["why"]) for r in result["refused"]] == [
        (3, "it spills 500 bytes per thread when compiled here, the default 16")
    ]
    assert "\nrefused BLOCK_N=32" in run("explain", *CALL).stdout
    cache_resources(render(SPEC, config(4), H200), H200, Resources(255, 500, 1000))
    assert (
        run_json("explain", *CALL)["reason"]
        == "every borrowed kernel spills too much, does not fit or does not compile here"
    )


def test_explain_predictions_and_failures(store: Store) -> None:
    store.save(make_record(90.0, "predicted"))
    store.save(make_record(None, "wrong", splits=3))
    result = run_json("explain", *CALL)
    assert result["from"] == "default"
    assert result["reason"] == "no config of this kernel and bucket was timed; results: 1 predicted, 1 wrong"


def test_explain_a_record_whose_config_is_no_longer_valid(store: Store) -> None:
    store.save(make_record(90.0, splits=5))  # not a value of the knob
    result = run_json("explain", *CALL)
    assert result["from"] == "default"
    assert result["reason"].startswith("the only record is not used: no longer valid: NUM_SPLITS is 5")


def test_explain_a_kernel_with_a_window(store: Store) -> None:
    other = dataclasses.replace(DKDV_PLACE, bucket=Bucket(16, 4096, 4096, 1024))
    store.save(dkdv_record(500.0, place=other))
    text = run("explain", *DKDV_CALL).stdout
    assert "seqlen 4096, window 513; on h200" in text
    assert "from    the default config: this kernel and bucket have no records" in text
    unwindowed = [*DKDV_CALL[:6], *DKDV_CALL[8:]]
    assert (
        "from    the default config: this kernel and bucket have no records" in run("explain", *unwindowed).stdout
    )  # another kernel
    store.save(dkdv_record(900.0))
    result = run_json("explain", *DKDV_CALL)
    assert result["from"] == "yours"
    assert result["shape"]["window"] == 513
    assert result["record"]["rate"] == pytest.approx(
        2 * 6 * 2 * 32 * 96 * (4096**2 / 2 - (4096 - 512) ** 2 / 2) / 900.0 / 1e6
    )  # at the bucket's own sizes
    assert Path(result["file"]).read_text(encoding="utf-8") == render(DKDV_SPEC, dkdv_record().config, H200).text


@pytest.mark.parametrize("op", ["forward", "preprocess", "dkdv", "dqdr", "decode"])
def test_explain_has_an_answer_for_every_op(op: str) -> None:
    result = run_json("explain", "--gpu", "h200", "--op", op, "--head-dim", "64", "--shape", "2,32/8,4096")
    assert result["spec"]["op"] == op
    assert result["bucket"]["kv_rows"] == (64 if op == "preprocess" else 16)
