"""list and show, on hand-made records."""

from __future__ import annotations

import dataclasses
import json
import math

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
    start_python,
)

from parallax_gen.memory.shipped import write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.ops.space import default_config
from parallax_gen.problem.shapes import Bucket, Shape

HERE = Toolchain.here()
TRITON_HERE = minor(HERE.triton)
OTHER_BUCKET = dataclasses.replace(PLACE, bucket=Bucket(1024, 1, 8192))  # not near
SIBLING = dataclasses.replace(PLACE, gpu="h100")

# list


def test_list_without_records() -> None:
    assert "there are no results yet" in run("list").stdout
    assert run_json("list") == {"records": []}


def test_list_has_the_best_of_each_place(store: Store) -> None:
    for result in (
        make_record(250.0),
        make_record(240.0, splits=1),
        make_record(None, "wrong", splits=3),
        make_record(90.0, "predicted", 4),
    ):
        store.save(result)
    records = run_json("list")["records"]
    assert [(r["config"]["NUM_SPLITS"], r["outcome"], r["origin"], r["used"]) for r in records] == [
        (1, "ok", "yours", True)
    ]
    assert records[0]["rate"] == pytest.approx(4477, rel=0.01)
    assert records[0]["rate_unit"] == "GB/s"
    assert len(run_json("list", "--all")["records"]) == 4
    assert run_json("list", "--op", "forward") == run_json("list", "--gpu", "a100") == {"records": []}
    (borrowed,) = run_json("list", "--gpu", "h100")["records"]  # of the same compute capability
    assert borrowed["config"] == records[0]["config"]
    assert borrowed["place"]["gpu"] == "h200"
    table = run("list", "--gpu", "H200").stdout
    assert "h200: decode, head_dim 128, bf16, GQA 4:1" in table
    assert "N32 H8 S1 w1 s4  measured" in table
    assert "S2" not in table


def test_list_marks_unused_and_shipped_records(store: Store) -> None:
    store.save(make_record(100.0, evidence_changes=OTHER_KERNEL))
    store.save(make_record(300.0, "predicted", place=OTHER_BUCKET))
    write_shipped([make_record(250.0)], "h200")
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


def test_list_shows_the_record_that_a_call_gets(store: Store) -> None:
    """For each place the record that a call gets, from whichever toolchain or sibling card."""
    longer = dataclasses.replace(PLACE, bucket=Bucket(4096, 1, 8192))
    store.save(make_record(100.0, evidence_changes=OTHER_TOOLCHAIN))
    store.save(make_record(110.0, splits=3, evidence_changes=OTHER_TOOLCHAIN))
    store.save(make_record(200.0, place=dataclasses.replace(SIBLING, bucket=OTHER_BUCKET.bucket)))
    store.save(make_record(None, "wrong", splits=3, place=OTHER_BUCKET))
    store.save(make_record(50.0, place=longer, evidence_changes=OTHER_KERNEL))
    records = run_json("list", "--gpu", "h200")["records"]
    assert [(r["time_us"], r["place"]["gpu"], r["of_place"]["gpu"], r["counts_as"], r["used"]) for r in records] == [
        (100.0, "h200", "h200", "Triton 3.4", False),
        (200.0, "h100", "h200", "this Triton on h100", True),
        (50.0, "h200", "h200", "not used", False),
    ]
    assert [r["checked"] for r in records] == [False, False, True]
    table = run("list", "--gpu", "h200").stdout
    assert "measured  Triton 3.4 (not yet checked)\n" in table
    assert "measured  this Triton on h100 (not yet checked)\n" in table
    assert "measured  not used\n" in table


def test_list_shows_the_gain_over_the_default(store: Store) -> None:
    """The gain of a place compares times of one toolchain and card."""
    default = default_config(SPEC, Shape(32, 32, 8, 1, 8192), H200)
    assert default not in (config(2), config(3))
    store.save(make_record(100.0))
    store.save(make_record(112.0, config=default))
    store.save(make_record(200.0, place=OTHER_BUCKET))
    store.save(make_record(150.0, place=OTHER_BUCKET, config=default, evidence_changes=OTHER_TOOLCHAIN))
    store.save(make_record(None, "wrong", splits=3))
    records = run_json("list")["records"]
    assert [(r["time_us"], r["default_us"], r["gain"]) for r in records] == [(100.0, 112.0, 1.12), (200.0, None, None)]
    lines = run("list").stdout.partition("h200: ")[2].splitlines()  # after the summary
    assert [line.split()[4] for line in lines[1:4]] == ["gain", "1.12x", "-"]
    all_gains = {(r["time_us"], r["gain"]) for r in run_json("list", "--all")["records"]}
    assert all_gains == {(100.0, 1.12), (112.0, 1.0), (None, None), (200.0, None), (150.0, 1.0)}


def test_list_compares_a_sibling_cards_record_with_the_default_there(store: Store) -> None:
    default = default_config(SPEC, Shape(32, 32, 8, 1, 8192), H200)
    store.save(make_record(100.0, place=SIBLING))
    store.save(make_record(130.0, place=SIBLING, config=default))
    store.save(make_record(50.0, evidence_changes=OTHER_KERNEL))
    store.save(make_record(60.0, evidence_changes=OTHER_KERNEL, config=default))
    (record,) = run_json("list", "--gpu", "h200")["records"]
    assert (record["place"]["gpu"], record["default_us"], record["gain"]) == ("h100", 130.0, 1.3)
    gains = [r["gain"] for r in run_json("list", "--all", "--gpu", "h200")["records"]]
    assert gains == [None, None]  # no call gets these kernels


def test_tables_fit_and_have_no_colours(store: Store) -> None:
    store.save(make_record(123456.7, splits=128))
    store.save(make_record(12345.6, splits=96, registers=255, spills=1024, shared_bytes=232448, error=1e-3))
    store.save(make_record(None, "compile", splits=1, detail="[red]a detail[/red]"))
    for command in (("list", "--all"), ("show", *CALL)):
        out = run(*command).stdout
        tables = [line for line in out.splitlines() if " w1 s4" in line and "registers" not in line]
        assert tables
        assert max(map(len, tables)) <= 80
        assert "\x1b" not in out
    assert "    [red]a detail[/red]\n" in run("show", *CALL).stdout


def test_list_of_kernels_with_flags_and_without(store: Store) -> None:
    """Records omit fields at their default; sorting and grouping work all the same."""
    spec, bucket = dataclasses.replace(DKDV_SPEC, window=False), Bucket(1, 1, 128)
    whole = dataclasses.replace(DKDV_PLACE, spec=spec, bucket=bucket)
    packed = dataclasses.replace(DKDV_PLACE, spec=dataclasses.replace(DKDV_SPEC, varlen=True))
    longer = dataclasses.replace(whole, bucket=Bucket(1, 1, 256))
    for place in (whole, DKDV_PLACE, packed, longer):
        store.save(dkdv_record(place=place))
    text = run("list").stdout
    titles = [line for line in text.splitlines() if line.startswith("h200: ")]
    kernel = "h200: dkdv, head_dim 96, bf16, GQA 4:1, "
    assert sorted(titles) == [f"{kernel}{flags}" for flags in ("causal", "window", "window, varlen")]
    assert "4096 W512" in text
    assert "M64 N128 G4 w8 s2 chunk tma qr  measured" in text
    assert run_json("list")["records"][0]["rate_unit"] == "TFLOP/s"


# show


def test_show_lists_all_results_of_a_place(store: Store) -> None:
    timed = [make_record(250.0, error=2e-3), make_record(240.0, splits=1), make_record(90.0, "predicted", splits=4)]
    failed = [
        make_record(None, "wrong", splits=3, detail="row 7 is NaN", error=math.inf),
        make_record(None, "resources", splits=6, detail="spills 900 bytes"),
        make_record(900.0, "slow", splits=8),
    ]
    for result in [*timed, *failed, make_record(1.0, place=OTHER_BUCKET)]:
        store.save(result)
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


def test_show_says_how_each_result_differs_from_here(store: Store) -> None:
    store.save(make_record(100.0, evidence_changes=OTHER_TOOLCHAIN))
    store.save(make_record(120.0, evidence_changes=OTHER_KERNEL))
    store.save(make_record(130.0))
    store.save(make_record(140.0, place=SIBLING))
    lines = run("show", *CALL).stdout.splitlines()
    assert lines[2].endswith(f"measured  triton 3.4 (here {TRITON_HERE}), cuda 12.4 (here {HERE.cuda})")
    assert lines[3].endswith("measured  another kernel than today's")
    assert lines[4].endswith("  measured")
    assert len(run_json("show", *CALL)["results"]) == 3  # this card's


def test_show_without_results() -> None:
    assert "there are no results for this kernel and bucket" in run("show", *CALL).stdout
    assert run_json("show", *CALL)["results"] == []


def test_show_of_a_kernel_with_a_window(store: Store) -> None:
    store.save(dkdv_record())
    store.save(dkdv_record(None, "crash", stages=3, detail="exit status -11"))
    store.save(dkdv_record(1.0, place=dataclasses.replace(DKDV_PLACE, bucket=Bucket(16, 4096, 4096, 1024))))
    text = run("show", *DKDV_CALL).stdout
    kernel, bucket = "dkdv, head_dim 96, bf16, GQA 4:1, window", "batch x kv_heads 16, seqlen 4096, window 512"
    assert text.startswith(f"h200: {kernel}; {bucket}\n")
    assert "M64 N128 G4 w8 s2 chunk tma qr  measured" in text
    assert "crash: M64 N128 G4 w8 s3 chunk" in text
    result = run_json("show", *DKDV_CALL)
    assert len(result["results"]) == 2
    assert result["place"]["bucket.window"] == 512


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"cuda": "11.8"}, f"cuda 11.8 (here {HERE.cuda})"),
        ({"cuda": ""}, f"cuda unknown (here {HERE.cuda})"),  # older than this field
        ({"protocol": 7, "triton": "3.4"}, f"triton 3.4 (here {TRITON_HERE}), protocol 7 (here 1)"),
        (OTHER_KERNEL, "another kernel than today's"),
        (OTHER_KERNEL | {"triton": "3.4"}, f"another kernel than today's, triton 3.4 (here {TRITON_HERE})"),
        ({"kernel": "", "text": "", "templates": "0" * 12}, "another kernel than today's"),
    ],
)
def test_show_names_the_evidence_that_differs(store: Store, there: dict[str, object], message: str) -> None:
    store.save(make_record(100.0, evidence_changes=there))
    assert f"measured  {message}\n" in run("show", *CALL).stdout
    (result,) = run_json("show", *CALL)["results"]
    assert ", ".join(result["unlike_here"]) == message
    assert not result["used"]


def test_json_is_one_document_in_a_real_pipe(store: Store) -> None:
    store.save(make_record(250.0))
    out, err = start_python("-m", "parallax_gen.cli", "show", *CALL, "--json").communicate(timeout=60)
    assert 250.0 in [record["time_us"] for record in json.loads(out)["results"]]  # next to the records that really ship
    assert err == ""
