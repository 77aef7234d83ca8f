"""Measures the kernels of a basket of models within a time: how the shipped records are made. On a card, from the top:

    PARALLAX_GEN_DB=basket.db python tests/tune_basket.py models.json 600 [--trials 6] [--budget 4] [--kind decode]...
    PARALLAX_GEN_DB=basket.db parallax-gen ship --gpu h200

models.json is a file as `parallax-gen list --basket` reads it. What lacks a record of this card and Triton is measured,
first what gets its default without any evidence, of that every other bucket, since their neighbours may borrow, and of
those the heaviest. Each kernel gets a few trials: the default, and what is fastest in near buckets. At the end of the
time it stops; every finished trial is in the database.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections import Counter
from pathlib import Path

from parallax_gen.codegen.device import gpu_here
from parallax_gen.memory.ranking import Tier, best
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.problem.basket import KINDS, basket_calls
from parallax_gen.problem.hardware import STAND_IN, gpu_by_name
from parallax_gen.problem.shapes import Bucket
from parallax_gen.tuning.job import Job, Progress
from parallax_gen.tuning.tuner import Tuner


class TimeIsOver(Exception):
    pass


class Watcher:
    """Prints each kernel's best time, and ends the tune after so many seconds."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds
        self.ended = 0

    def begin(self, job: Job) -> None:
        pass

    def update(self, progress: Progress) -> None:
        pass

    def end(self, progress: Progress) -> None:
        self.ended += 1
        us = "nothing" if progress.best is None else f"{progress.best.time_us:.5g} us"
        print(f"{self.ended}: {progress.job.spec}; {progress.job.bucket}: {us} in {progress.done} trials", flush=True)
        if time.monotonic() > self._end:
            raise TimeIsOver


def is_odd(bucket: Bucket) -> bool:
    """Whether a bucket lies between those that are measured first: one step from each of its neighbours."""
    return int(math.log2(bucket.kv_rows) + math.log2(bucket.seqlen_kv)) % 2 == 1


def jobs_of(basket: Path, kinds: list[str], memory: Memory) -> list[Job]:
    """A job for each place of the basket that has no record of this card and toolchain, in the order of measuring."""
    card = gpu_here(0) or gpu_by_name(STAND_IN)
    weights: Counter[Job] = Counter()
    for call in basket_calls(json.loads(basket.read_text(encoding="utf-8")), str(basket)):
        if call.kind in kinds:
            weights[Job.of(call.spec, call.shape, card)] += call.weight
    tiers = {job: best(job.place, card, memory).tier for job in weights}
    lacking = [job for job, tier in tiers.items() if tier > Tier.MEASURED_HERE]
    return sorted(lacking, key=lambda job: (-tiers[job], is_odd(job.bucket), -weights[job], job.place.order))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("basket", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--trials", type=int, default=6, help="configs for each kernel and bucket")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each")
    parser.add_argument("--most", type=int, help="how many kernels and buckets, at most")
    parser.add_argument("--predict", action="store_true", help="compile and predict, without a card")
    options = parser.parse_args()
    store, watcher = Store(), Watcher(options.seconds)
    jobs = jobs_of(options.basket, options.kind or list(KINDS), Memory(store))
    print(f"{len(jobs)} kernels and buckets have no record of this card and Triton", flush=True)
    with Tuner(store, measure=not options.predict) as tuner, contextlib.suppress(TimeIsOver):
        tuner.tune_all(jobs[: options.most], trials=options.trials, time_budget_s=options.budget, watcher=watcher)
    print(f"{watcher.ended} were measured")


if __name__ == "__main__":
    main()
