"""list, show, explain and ship, over results made by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from cli_samples import (
    CALL,
    DKDV_CALL,
    DKDV_KEY,
    DKDV_SPEC,
    H200,
    KEY,
    SPEC,
    config,
    elsewhere,
    known,
    known_dkdv,
    run,
    run_json,
)

from parallax_gen.codegen.render import render
from parallax_gen.memory.shipped import load_shipped, write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.problem.config import config_to_dict
from parallax_gen.problem.shapes import Bucket

OTHER_TRITON = elsewhere(triton="3.4")
OTHER_BUCKET = dataclasses.replace(KEY, bucket=Bucket(256, 1, 16384))

# list


def test_list_of_nothing() -> None:
    assert "nothing is known yet" in run("list").stdout
    assert run_json("list") == {"records": []}


def test_list_has_the_best_of_each_key(store: Store) -> None:
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
    store.record(known(100.0, key=OTHER_TRITON))
    store.record(known(300.0, "predicted", key=OTHER_BUCKET))
    write_shipped([known(250.0)], "h200")
    records = run_json("list")["records"]
    here = KEY.environment.triton
    assert sorted((r["origin"], r["outcome"], r["used"]) for r in records) == [
        ("shipped", "ok", True),
        ("yours", "ok", False),
        ("yours", "predicted", True),
    ]
    table = run("list").stdout
    assert table.index("shipped") < table.index(f"unused here: triton 3.4 (here {here})") < table.index("measured\n")


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
    whole = dataclasses.replace(DKDV_KEY, spec=dataclasses.replace(DKDV_SPEC, window=False), bucket=Bucket(1, 1, 128))
    packed = dataclasses.replace(DKDV_KEY, spec=dataclasses.replace(DKDV_SPEC, varlen=True))
    here = DKDV_KEY.environment
    keys = [whole, DKDV_KEY, packed, dataclasses.replace(whole, environment=dataclasses.replace(here, triton="3.4"))]
    for key in keys:
        store.record(known_dkdv(key=key))
    text = run("list").stdout
    titles = [line for line in text.splitlines() if line.startswith("h200: ")]
    kernel = "h200: dkdv, head_dim 96, bf16, GQA 4:1, "
    assert sorted(titles) == [f"{kernel}{flags}" for flags in ("causal", "causal", "window", "window, varlen")]
    assert "4096 W512" in text
    assert "M64 N128 G4 w8 s2 pieces  measured" in text
    assert run_json("list")["records"][0]["rate_unit"] == "TFLOP/s"


# show


def test_show_has_everything_of_one_key(store: Store) -> None:
    timed = [known(250.0, error=2e-3), known(240.0, splits=1), known(90.0, "predicted", splits=4)]
    failed = [
        known(None, "wrong", splits=3, detail="row 7 is NaN", error=math.inf),
        known(None, "resources", splits=6, detail="spills 900 bytes"),
        known(900.0, "slow", splits=8),
    ]
    for result in [*timed, *failed, known(1.0, key=OTHER_BUCKET)]:
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


def test_show_of_nothing() -> None:
    assert "nothing is known under this key" in run("show", *CALL).stdout
    assert run_json("show", *CALL)["results"] == []


def test_show_of_a_kernel_with_a_window(store: Store) -> None:
    store.record(known_dkdv())
    store.record(known_dkdv(None, "crash", stages=3, detail="exit status -11"))
    store.record(known_dkdv(1.0, key=dataclasses.replace(DKDV_KEY, bucket=Bucket(16, 4096, 4096, 1024))))
    text = run("show", *DKDV_CALL).stdout
    assert text.startswith("h200: dkdv, head_dim 96, bf16, GQA 4:1, window; 16 kv rows, seqlen 4096, window 512\n")
    assert "M64 N128 G4 w8 s2 pieces  measured" in text
    assert "crash: M64 N128 G4 w8 s3 pieces" in text
    found = run_json("show", *DKDV_CALL)
    assert len(found["results"]) == 2
    assert found["key"]["bucket.window"] == 512


# explain


def test_explain_a_default_that_nothing_is_known_of() -> None:
    found = run_json("explain", *CALL)
    assert found["from"] == "default"
    assert found["record"] is None
    assert found["reason"] == "nothing is known under this call's key"
    assert found["near_misses"] == found["runners_up"] == found["predicted"] == []
    assert "from    the default config: nothing is known" in run("explain", *CALL).stdout


def test_explain_a_record_and_its_runners_up(store: Store) -> None:
    for splits in (1, 2, 3, 4, 6):
        store.record(known(200.0 + splits, splits=splits))
    store.record(known(90.0, "predicted", splits=8))
    found = run_json("explain", *CALL)
    assert found["from"] == "yours"
    assert found["config"] == config_to_dict(config(1))
    assert Path(found["file"]).read_text(encoding="utf-8") == render(SPEC, config(1), H200).text
    assert [r["time_us"] for r in found["runners_up"]] == [202.0, 203.0, 204.0]
    assert [r["time_us"] for r in found["predicted"]] == [90.0]
    text = run("explain", *CALL).stdout
    assert "from    your record, the fastest of 5 measured under this call's key:" in text
    assert "2026-01-01" in text
    assert "only predicted, so not used\n  BLOCK_N=32 BLOCK_H=8 NUM_SPLITS=8" in text


def test_explain_a_shipped_record() -> None:
    write_shipped([known(250.0)], "h200")
    assert run_json("explain", *CALL)["from"] == "shipped"
    assert "from    a shipped record, the only one measured" in run("explain", *CALL).stdout


def test_explain_near_misses_by_the_field_that_differs(store: Store) -> None:
    store.record(known(110.0, key=OTHER_TRITON))
    store.record(known(100.0, splits=1, key=OTHER_TRITON))
    store.record(known(50.0, key=OTHER_BUCKET))
    found = run_json("explain", *CALL)
    assert found["from"] == "default"
    (miss,) = found["near_misses"]  # of those that differ in the same way the fastest; no other bucket beside them
    assert miss["differs"] == {"environment.triton": {"here": KEY.environment.triton, "there": "3.4"}}
    assert miss["record"]["time_us"] == 100.0
    assert f"triton 3.4 (here {KEY.environment.triton})" in run("explain", *CALL).stdout


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({"cuda": "11.8"}, f"cuda 11.8 (here {KEY.environment.cuda})"),
        ({"cuda": ""}, f"cuda unknown (here {KEY.environment.cuda})"),  # from before it was recorded
        ({"space": 7}, f"space 7 (here {KEY.environment.space})"),
        (
            {"protocol": 7, "triton": "3.4"},
            f"triton 3.4 (here {KEY.environment.triton}), protocol 7 (here {KEY.environment.protocol})",
        ),
    ],
)
def test_explain_says_which_field_of_the_environment_differs(store: Store, there: dict[str, object], told: str) -> None:
    store.record(known(100.0, key=elsewhere(**there)))
    assert told in run("explain", *CALL).stdout


def test_explain_another_bucket(store: Store) -> None:
    store.record(known(50.0, key=OTHER_BUCKET))
    assert "seqlen_kv 16384 (here 8192)" in run("explain", *CALL).stdout


def test_explain_what_was_only_predicted_or_failed(store: Store) -> None:
    store.record(known(90.0, "predicted"))
    store.record(known(None, "wrong", splits=3))
    found = run_json("explain", *CALL)
    assert found["from"] == "default"
    assert found["reason"] == "nothing was measured under this call's key, only: 1 predicted, 1 wrong"


def test_explain_a_record_that_is_not_valid_any_more(store: Store) -> None:
    store.record(known(90.0, splits=5))  # no value of the knob
    found = run_json("explain", *CALL)
    assert found["from"] == "default"
    assert found["reason"].startswith("the fastest record is not valid any more: NUM_SPLITS is 5")


def test_explain_a_kernel_with_a_window(store: Store) -> None:
    other = dataclasses.replace(DKDV_KEY, bucket=Bucket(16, 4096, 4096, 1024))
    store.record(known_dkdv(500.0, key=other))
    text = run("explain", *DKDV_CALL).stdout
    assert "seqlen 4096, window 513; on h200" in text
    assert "from    the default config: nothing is known" in text
    assert "window 1024 (here 512)" in text
    unwindowed = [*DKDV_CALL[:6], *DKDV_CALL[8:]]
    assert "near misses" not in run("explain", *unwindowed).stdout  # another kernel
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


# ship


def test_ship_merges_what_was_measured_here(store: Store, tmp_path: Path) -> None:
    for splits in (1, 2, 3, 4):
        store.record(known(200.0 + splits, splits=splits))
    store.record(known(100.0, key=OTHER_TRITON))
    store.record(known(90.0, "predicted", splits=6))
    result = run("ship", "--gpu", "h200", "--to", tmp_path / "db")
    assert result.exit_code == 0, result.output
    assert [r.time_us for r in load_shipped("h200", tmp_path / "db")] == [201.0, 202.0, 203.0]
    assert "3 records of 1 kernels and buckets; 3 new or changed" in result.stdout
    store.record(known(None, "wrong", splits=1, created_at="2026-02-01T00:00:00+00:00"))
    run("ship", "--gpu", "h200", "--to", tmp_path / "db")
    assert [r.time_us for r in load_shipped("h200", tmp_path / "db")] == [202.0, 203.0, 204.0]


def test_ship_takes_every_op(store: Store, tmp_path: Path) -> None:
    for result in (known(), known_dkdv(), known_dkdv(key=dataclasses.replace(DKDV_KEY, bucket=Bucket(16, 512, 512)))):
        store.record(result)
    assert run("ship", "--gpu", "h200", "--to", tmp_path / "db").exit_code == 0
    assert {r.key for r in load_shipped("h200", tmp_path / "db")} == {r.key for r in store.all()}


def test_ship_of_nothing_is_an_error(store: Store, tmp_path: Path) -> None:
    store.record(known(100.0, key=OTHER_TRITON))
    result = run("ship", "--gpu", "h200", "--to", tmp_path / "db")
    assert result.exit_code == 1
    assert "nothing that was measured on h200 in this environment" in result.stderr
    assert not (tmp_path / "db").exists()


def test_json_is_one_document_in_a_real_pipe(store: Store) -> None:
    from cli_samples import process

    store.record(known(250.0))
    out, err = process("-m", "parallax_gen.cli", "list", "--json").communicate(timeout=60)
    assert 250.0 in [record["time_us"] for record in json.loads(out)["records"]]  # beside what really ships
    assert err == ""
