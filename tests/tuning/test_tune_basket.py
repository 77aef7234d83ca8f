"""The order in which a basket's kernels are measured, and the report on what its calls lose."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from basket_regret import print_slowdowns, sample
from tune_basket import by_gain, jobs_of, weights_of

from parallax_gen.codegen.render import render
from parallax_gen.memory.ranking import Tier, best, default_of, evidence_of, near_places
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.problem.basket import KINDS
from parallax_gen.problem.hardware import GPUS
from parallax_gen.tuning.job import Job

CARD = GPUS["h200"]  # the stand-in without a card
BASKET = {
    "training": {"batch": [1, 4], "seqlen": [2048], "at_most_tokens": 8192},
    "serving": {"batch": [1, 2, 4], "kv_len": [1024, 2048], "page_size": [16], "chunk": [512], "chunk_batch": [1]}
    | {"cache_gib_at_most": 8, "chunk_tokens_at_most": 512},
    "models": [
        {"name": "small", "heads": 24, "kv_heads": 8, "head_dim": 80, "tp": [1], "weight": 1},
        {"name": "popular", "heads": 32, "kv_heads": 8, "head_dim": 128, "tp": [1], "weight": 5},
    ],
}


@pytest.fixture
def weights(tmp_path: Path) -> Counter[Job]:
    path = tmp_path / "models.json"
    path.write_text(json.dumps(BASKET), encoding="utf-8")
    return weights_of(path, KINDS)


def test_what_no_record_supports_comes_first(weights: Counter[Job]) -> None:
    jobs = jobs_of(weights, Memory())
    assert len(jobs) == len(set(jobs))
    lacking = {job for job in weights if best(job.place, CARD, Memory()).tier > Tier.MEASURED_HERE}
    assert set(jobs) == lacking
    without = {job.place for job in jobs if best(job.place, CARD, Memory()).tier == Tier.DEFAULT}
    first = [job.place for job in jobs[: len(without)] if job.place in without]
    supported = set(first) | {near for place in first for near in near_places(place, CARD)}
    assert without <= supported


def test_the_fewest_places_that_support_all_the_heaviest_first(weights: Counter[Job]) -> None:
    """The middle one of three buckets in a row supports all. A heavier one with no bucket near it comes before them."""
    job = next(iter(weights))
    row = [replace(job, bucket=replace(job.bucket, seqlen_q=n, seqlen_kv=n)) for n in (1024, 4096, 16384)]
    alone = replace(job, bucket=replace(job.bucket, kv_rows=job.bucket.kv_rows * 64))
    given = {j.place: j for j in (*row, alone)}
    assert by_gain(given, Counter(dict.fromkeys(row, 2.0)) | {alone: 5.0}) == [row[1], alone]
    assert by_gain(given, Counter(dict.fromkeys(row, 2.0)) | {alone: 7.0}) == [alone, row[1]]


def test_heavier_places_are_drawn_more_often_and_none_twice(weights: Counter[Job]) -> None:
    drawn = [job for seed in range(200) for job in sample(weights, 3, seed)]
    assert all(len(set(sample(weights, 3, seed))) == 3 for seed in range(20))
    popular = sum(job.spec.head_dim == 128 for job in drawn) / len(drawn)
    share = sum(w for job, w in weights.items() if job.spec.head_dim == 128) / weights.total()
    assert abs(popular - share) < 0.08


def test_slowdowns_are_over_the_fastest_of_this_toolchain(
    weights: Counter[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, nothing_shipped = Store(tmp_path / "regret.db"), Memory(folder=tmp_path)
    timed, untimed = list(weights)[:2]
    default = default_of(timed.place, CARD)
    faster = replace(default, GROUP_HEADS=1)
    for config, us, triton in ((default, 12.0, None), (faster, 10.0, None), (faster, 1.0, "3.0.0")):
        evidence = evidence_of(render(timed.spec, config, CARD))
        evidence = evidence if triton is None else replace(evidence, triton=triton)
        store.save(Result(timed.place, evidence, config, "ok", time_us=us))
    print_slowdowns([timed, untimed], store, nothing_shipped)
    first, second, *summary = capsys.readouterr().out.splitlines()
    assert first.startswith("1.200 the default: ")
    assert second.startswith("not measured: ")
    assert summary[-1] == "all: 1 places, 1.200 in the geometric mean, 1.200 at the worst"
