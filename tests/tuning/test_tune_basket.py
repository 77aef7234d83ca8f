"""The order in which a basket's kernels are measured."""

from __future__ import annotations

import json
from pathlib import Path

from tune_basket import is_odd, jobs_of

from parallax_gen.memory.ranking import Tier, best, near_places
from parallax_gen.memory.shipped import Memory
from parallax_gen.problem.basket import KINDS
from parallax_gen.problem.hardware import GPUS

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


def test_what_no_record_supports_comes_first_then_every_other_bucket_then_the_heaviest(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    path.write_text(json.dumps(BASKET), encoding="utf-8")
    memory = Memory()
    jobs = jobs_of(path, list(KINDS), memory)
    tiers = [best(job.place, CARD, memory).tier for job in jobs]
    assert tiers == sorted(tiers, reverse=True)
    assert Tier.MEASURED_HERE not in tiers
    without = [job for job, tier in zip(jobs, tiers, strict=True) if tier == Tier.DEFAULT]
    odd = [is_odd(job.bucket) for job in without]
    assert odd == sorted(odd)
    assert {False, True} == set(odd)
    first = [job.spec.head_dim for job in without if not is_odd(job.bucket)]
    assert first == sorted(first, reverse=True)


def test_neighbours_of_a_bucket_at_half_and_double_sizes_are_of_the_other_kind(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    path.write_text(json.dumps(BASKET), encoding="utf-8")
    for job in jobs_of(path, list(KINDS), Memory()):
        half, double, *_ = near_places(job.place)
        assert is_odd(half.bucket) is is_odd(double.bucket) is not is_odd(job.bucket)
