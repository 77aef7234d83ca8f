"""A program for a test to kill: it tunes on a simulated machine forever, and prints each trial once it is stored.

usage: endless_tune.py DATABASE SEED
"""

from __future__ import annotations

import random
import sys
import time

from simulated_machine import FINE, Machine, timed

from parallax_gen.memory.result import Outcome
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning import tuner as tuning
from parallax_gen.tuning.job import Job, Progress
from parallax_gen.tuning.tuner import Tuner
from parallax_gen.tuning.workers.messages import Reply

A100 = GPUS["a100"]  # has no shipped records, which take a process half a second to read
JOBS = [Job(KernelSpec("decode", head_dim, "bf16"), Bucket(8, 1, 1024), A100) for head_dim in range(8, 257, 8)]


class Printer:
    """A watcher that prints one line per trial, read from the store."""

    def __init__(self) -> None:
        self.done: dict[Job, int] = {}

    def begin(self, job: Job) -> None:
        self.done[job] = 0

    def update(self, progress: Progress) -> None:
        if progress.done > self.done[progress.job]:
            self.done[progress.job] = progress.done
            print(progress.job.place.digest, progress.known + progress.done, flush=True)

    def end(self, progress: Progress) -> None:
        pass


def main() -> None:
    database, seed = sys.argv[1:]
    chance = random.Random(int(seed))

    def measure(config: KernelConfig, n: int) -> Reply:
        time.sleep(chance.uniform(0.0005, 0.002))
        return timed(chance.uniform(50.0, 500.0)) if chance.random() < 0.8 else Reply(Outcome.CRASH, "made up")

    machine = Machine(compile=lambda config, n: Reply(Outcome.OK, resources=FINE), measure=measure)
    tuning.Worker = machine.worker  # type: ignore[assignment, misc]
    jobs = chance.sample(JOBS, len(JOBS))
    with Store(database) as store, Tuner(store, measure=True, compilers=1) as tuner:
        tuner.tune_all(jobs, trials=10_000, time_budget_s=3600.0, watcher=Printer())


if __name__ == "__main__":
    main()
