"""Measures the kernels of a basket of models within a time: how the shipped records are made. On a card, from the top:

    PARALLAX_GEN_DB=basket.db python tests/tune_basket.py models.json 600 [--trials 6] [--budget 4] [--kind decode]...
    PARALLAX_GEN_DB=basket.db parallax-gen ship --gpu h200

models.json is a file as `parallax-gen list --basket` reads it. What lacks a record of this card and Triton is measured,
the place (a kernel and a bucket of sizes) first whose record would be the first evidence for the most calls, its own
and those of near buckets. Each gets a few trials: the default, and what is fastest in near buckets. All GPUs here
measure. At the end of the time it stops; every finished trial is in the database.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from parallax_gen.codegen.device import gpu_here
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Tier, best, near_places
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.problem.basket import KINDS, basket_calls
from parallax_gen.problem.hardware import STAND_IN, gpu_by_name
from parallax_gen.tuning.job import Job, Progress
from parallax_gen.tuning.tuner import Tuner, start_measuring_workers
from parallax_gen.tuning.workers.visible import visible_devices

ROUND = 96  # places that are measured before what they support is looked up


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


def weights_of(basket: Path, kinds: Iterable[str]) -> Counter[Job]:
    """The weight of each kernel and bucket of a basket's calls, on the card here or the one that stands in for it."""
    card = gpu_here(0) or gpu_by_name(STAND_IN)
    weights: Counter[Job] = Counter()
    for call in basket_calls(json.loads(basket.read_text(encoding="utf-8")), str(basket)):
        if call.kind in kinds:
            weights[Job.of(call.spec, call.shape, card)] += call.weight
    return weights


def jobs_of(weights: Mapping[Job, float], memory: Memory) -> list[Job]:
    """The jobs that have no record of this card and toolchain, in the order of measuring."""
    tiers = {job: best(job.place, job.gpu, memory).tier for job in weights}
    without = {job.place: job for job, tier in tiers.items() if tier == Tier.DEFAULT}
    first = by_gain(without, weights)
    others = [job for job, tier in tiers.items() if tier > Tier.MEASURED_HERE and job not in set(first)]
    return [*first, *sorted(others, key=lambda job: (-tiers[job], -weights[job], job.place.order))]


def by_gain(without: Mapping[Place, Job], weights: Mapping[Job, float]) -> list[Job]:
    """The fewest of these jobs whose records would support all, each the one that supports most that has no evidence.

    As if every record supported its near buckets. Gains only fall, so a job whose gain is still the one by which it was
    sorted has the largest.
    """
    supported = {
        job: [job, *(without[near] for near in near_places(place, job.gpu) if near in without)]
        for place, job in without.items()
    }
    left, chosen = set(supported), []

    def key(job: Job) -> tuple[float, tuple[object, ...]]:
        return -sum(weights[other] for other in supported[job] if other in left), job.place.order

    queue = [(*key(job), number, job) for number, job in enumerate(supported)]
    heapq.heapify(queue)
    while left:
        gain, order, number, job = heapq.heappop(queue)
        if key(job) != (gain, order):
            heapq.heappush(queue, (*key(job), number, job))
        else:
            chosen.append(job)
            left.difference_update(supported[job])
    return chosen


def measure(weights: Counter[Job], tuner: Tuner, store: Store, options: argparse.Namespace) -> None:
    """Measure the basket's places that lack records until the time is over or there are none."""
    watcher, most, tried = Watcher(options.seconds), options.most or math.inf, set[Job]()
    with contextlib.suppress(TimeIsOver):
        while len(tried) < most:
            jobs = [job for job in jobs_of(weights, Memory(store)) if job not in tried]
            print(f"{len(jobs)} kernels and buckets have no record of this card and Triton", flush=True)
            if not jobs:
                break
            weights = Counter({job: weights[job] for job in jobs})
            now = jobs[: int(min(ROUND, most - len(tried)))]
            tuner.tune_all(now, trials=options.trials, time_budget_s=options.budget, watcher=watcher)
            tried.update(now)
    print(f"{watcher.ended} were measured")


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
    store, weights = Store(), weights_of(options.basket, options.kind or KINDS)
    measuring = None if options.predict else start_measuring_workers(range(visible_devices()))
    with Tuner(store, measure=not options.predict, measuring=measuring) as tuner:
        measure(weights, tuner, store, options)


if __name__ == "__main__":
    main()
