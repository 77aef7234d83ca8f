"""How much slower than the best of a search are the kernels that a basket's calls get? On a card, from the top:

    PARALLAX_GEN_DB=regret.db python tests/basket_regret.py models.json 60 [--trials 64] [--budget 10] [--seed 0]

Draws so many places (a kernel and a bucket of sizes) of models.json by their weights, tunes each from an empty database
and prints the time of what calls get from the shipped records over that of the fastest. What they get is timed first,
with the default, and again at the end of the search if it is among the fastest.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Mapping
from pathlib import Path

from tune_basket import Watcher, weights_of

from parallax_gen.memory.ranking import best, comparable_here, fastest, is_rendered
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.problem.basket import KINDS
from parallax_gen.tuning.job import Job
from parallax_gen.tuning.tuner import Tuner, start_measuring_workers
from parallax_gen.tuning.workers.visible import visible_devices


def sample(weights: Mapping[Job, float], count: int, seed: int = 0) -> list[Job]:
    """So many different jobs, drawn by their weights (Efraimidis and Spirakis 2006, algorithm A)."""
    draw = random.Random(seed)
    keys = {job: draw.random() ** (1 / weights[job]) for job in sorted(weights, key=lambda job: job.place.order)}
    return sorted(keys, key=lambda job: -keys[job])[:count]


def measured_here(job: Job, store: Store) -> list[Result]:
    """The results of this toolchain's kernels at a job's place, from fast to slow."""
    return fastest(r for r in store.results(job.place) if comparable_here(r.evidence) and is_rendered(r, job.gpu))


def print_slowdowns(jobs: list[Job], store: Store, shipped: Memory) -> None:
    """Print what calls lose at each place, and the mean and the worst by where the kernel comes from and in all."""
    slowdowns: dict[str, list[float]] = {}
    for job in jobs:
        choice, results = best(job.place, job.gpu, shipped), measured_here(job, store)
        chosen = next((result for result in results if result.config == choice.config), None)
        if chosen is None or chosen.time_us is None or results[0].time_us is None:
            print(f"not measured: {job.spec}; {job.bucket}: {choice.config}")
            continue
        slowdown = chosen.time_us / results[0].time_us
        print(f"{slowdown:.3f} {choice.source}: {job.spec}; {job.bucket}; best of {len(results)}: {results[0].config}")
        for name in (choice.source, "all"):
            slowdowns.setdefault(name, []).append(slowdown)
    for name, of_places in slowdowns.items():
        mean = statistics.geometric_mean(of_places)
        print(f"{name}: {len(of_places)} places, {mean:.3f} in the geometric mean, {max(of_places):.3f} at the worst")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("basket", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--trials", type=int, default=64, help="configs for each kernel and bucket")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds for each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    jobs = sample(weights_of(options.basket, options.kind or KINDS), options.count, options.seed)
    store, watcher = Store(), Watcher(math.inf)
    try:
        for trials, memory in ((2, Memory(store)), (options.trials, None)):
            measuring = start_measuring_workers(range(visible_devices()))
            with Tuner(store, measure=True, measuring=measuring, refresh=memory) as tuner:
                tuner.tune_all(jobs, trials=trials, time_budget_s=options.budget, watcher=watcher)
    finally:  # of an interrupt too
        print_slowdowns(jobs, store, Memory())


if __name__ == "__main__":
    main()
