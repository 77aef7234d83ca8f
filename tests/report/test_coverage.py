"""Shares of a basket's calls by tier, on records made for the test, and as the command prints them."""

from __future__ import annotations

import json
from pathlib import Path

from cli_samples import run, run_json

from parallax_gen.codegen.render import render
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, default_of, evidence_of
from parallax_gen.memory.result import Result
from parallax_gen.problem.basket import BasketCall
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.report.coverage import coverage, coverage_table

GPU = GPUS["h200"]
DECODE = KernelSpec("decode_varlen", 128, "bf16", 4)
FORWARD = KernelSpec("forward", 128, "bf16", 4, causal=True, stats=True)


def call(kind: str, spec: KernelSpec, shape: Shape, weight: int) -> BasketCall:
    return BasketCall(kind, spec, shape, weight)


def test_shares_are_weighted_and_counted_by_place() -> None:
    known, other = Shape(1, 32, 8, 1, 4096), Shape(64, 32, 8, 1, 4096)
    place = Place(GPU.name, DECODE, bucket_of(known))
    config = default_of(place, GPU)
    record = Result(place, evidence_of(render(DECODE, config, GPU)), config, "ok", time_us=5.0)
    calls = [
        call("decode", DECODE, known, 2),
        call("decode", DECODE, Shape(1, 32, 8, 1, 4000), 1),  # the same bucket
        call("decode", DECODE, other, 1),
        call("training", FORWARD, Shape(4, 32, 8, 4096, 4096), 4),
    ]
    training, decode, chunks, total = coverage(calls, GPU, RecordTable([record]))
    assert (decode.kind, decode.places) == ("decode", 2)
    assert decode.to_json()["shares"] == {"here": 0.75, "toolchain": 0, "sibling": 0, "near": 0, "default": 0.25}
    assert training.to_json()["shares"]["default"] == 1
    assert (chunks.places, chunks.to_json()["shares"]["here"]) == (0, 0)
    assert (total.places, total.to_json()["shares"]["here"]) == (3, 3 / 8)
    assert coverage_table([total], GPU).lines == [("all", "3", "37.5%", "0.0%", "0.0%", "0.0%", "62.5%")]


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "basket.json"
    basket = {
        "training": {"batch": [4], "seqlen": [4096], "at_most_tokens": 16384},
        "serving": {"batch": [1], "kv_len": [4096], "page_size": [0], "chunk": [512], "chunk_batch": [1]},
        "models": [{"name": "MHA", "heads": 16, "kv_heads": 16, "head_dim": 128, "tp": [1], "weight": 1}],
    }
    basket["serving"] |= {"cache_gib_at_most": 1, "chunk_tokens_at_most": 512}  # type: ignore[operator]
    path.write_text(json.dumps(basket), encoding="utf-8")
    found = run_json("list", "--gpu", "h200", "--basket", str(path))
    assert found["gpu"] == "h200"
    assert [part["places"] for part in found["coverage"]] == [4, 1, 1, 6]
    lines = run("list", "--gpu", "h200", "--basket", str(path), env={"COLUMNS": "80"}).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    path.write_text("{", encoding="utf-8")
    failed = run("list", "--gpu", "h200", "--basket", str(path))
    assert failed.exit_code == 2
    assert "basket.json, which is not JSON" in failed.stderr
