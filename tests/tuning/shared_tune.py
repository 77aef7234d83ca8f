"""A program for tests of shared storages: one of several tuners that share a job, on a simulated machine.

usage: shared_tune.py DATABASE STORAGE SEED     prints every config before it measures it
"""

from __future__ import annotations

import random
import sys
import time

from simulated_machine import FINE, Machine, timed

from parallax_gen.memory.result import Outcome
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import KernelConfig, config_to_json
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning import tuner as tuning
from parallax_gen.tuning.claims import Storage
from parallax_gen.tuning.job import Job, Progress
from parallax_gen.tuning.tuner import Tuner
from parallax_gen.tuning.workers.messages import TRIAL_MS, Reply

LEASE_S = 6.0  # four tuners share two cores, so a heartbeat may be seconds late
A100 = GPUS["a100"]  # has no shipped records, which take a process half a second to read
JOB = Job(KernelSpec("preprocess", 128, "bf16"), Bucket(16, 1024, 1024), A100)


def cost(config: KernelConfig) -> float:
    """A time that depends on the config only."""
    return random.Random(config_to_json(config)).uniform(50.0, 500.0)


def main() -> None:
    database, storage, seed = sys.argv[1:]
    chance = random.Random(int(seed))

    def measure(config: KernelConfig, n: int) -> Reply:
        if machine.measured[n].timed_ms == TRIAL_MS:  # a trial, not a finalist
            print(config_to_json(config), flush=True)
        time.sleep(chance.uniform(0.1, 0.3))
        return timed(cost(config)) if cost(config) > 100 else Reply(Outcome.CRASH, "made up")

    def ignore(_: Progress) -> None:
        pass

    machine = Machine(compile=lambda config, n: Reply(Outcome.OK, resources=FINE), measure=measure)
    tuning.Worker = machine.worker  # type: ignore[assignment, misc]
    place = Storage(storage, lease_s=LEASE_S)
    with Store(database) as store, Tuner(store, measure=True, compilers=1, storage=place) as tuner:
        tuner.tune(JOB, trials=10_000, time_budget_s=60.0, on_progress=ignore)


if __name__ == "__main__":
    main()
