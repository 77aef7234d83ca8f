"""Several jobs on several devices, on a simulated machine: scheduling, and interleaved timing of finalists."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
from simulated_machine import FINE, Machine, timed, timing

from parallax_gen.memory.ranking import best
from parallax_gen.memory.result import Outcome
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.space import every_config
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.finals import CLOSE_RATIO, MAX_INTERLEAVED
from parallax_gen.tuning.job import Job, Progress
from parallax_gen.tuning.tuner import Tuner
from parallax_gen.tuning.workers.messages import TRIAL_MS, Measure, MeasureInterleaved, Reply

GPU = GPUS["h200"]
JOBS = [Job(KernelSpec("decode", 128, "bf16"), Bucket(8, 1, 1024 << n), GPU) for n in range(5)]


@dataclass
class RecordingWatcher:
    """A watcher that records its calls, in order."""

    begun: list[Job] = field(default_factory=list)
    ended: list[Progress] = field(default_factory=list)

    def begin(self, job: Job) -> None:
        self.begun.append(job)

    def update(self, progress: Progress) -> None:
        assert progress.job in self.begun
        assert progress not in self.ended

    def end(self, progress: Progress) -> None:
        self.ended.append(progress)


def tune_all(
    store: Store, machine: Machine, jobs: list[Job], devices: int, *, trials: int = 6, compilers: int = 2
) -> tuple[list[Progress], RecordingWatcher]:
    notes = RecordingWatcher()
    measuring = {device: machine.worker(device=device) for device in range(devices)}
    with Tuner(store, measure=True, measuring=measuring, compilers=compilers) as tuner:
        done = tuner.tune_all(jobs, trials=trials, time_budget_s=60.0, watcher=notes)
    assert machine.open_workers == 0
    return done, notes


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_every_job_gets_its_trials_with_any_number_of_devices(store: Store, machine: Machine, devices: int) -> None:
    done, notes = tune_all(store, machine, JOBS, devices)
    assert [progress.job for progress in done] == notes.begun == JOBS
    assert [progress.done for progress in done] == [6] * len(JOBS)
    assert sorted(map(id, done)) == sorted(map(id, notes.ended))
    for progress in done:
        assert len(store.results(progress.job.place)) == 6
        assert progress.best == best(progress.job.place, GPU, store).record


def test_devices_work_concurrently_on_their_own_jobs(store: Store, machine: Machine) -> None:
    together = threading.Barrier(2, timeout=20)  # breaks unless two devices measure at the same time

    def measure(config: KernelConfig, n: int) -> Reply:
        together.wait()
        return timed(100.0)

    machine.measure = measure
    done, _ = tune_all(store, machine, JOBS[:2], 2, trials=4)
    assert [progress.outcomes for progress in done] == [{"ok": 4}] * 2
    shapes = {
        device: {r.instance.shape for d, r in machine.on if d == device and isinstance(r, Measure)} for device in (0, 1)
    }
    assert shapes == {0: {JOBS[0].shape}, 1: {JOBS[1].shape}}


def test_idle_devices_help_with_a_running_job(store: Store, machine: Machine) -> None:
    def measure(config: KernelConfig, n: int) -> Reply:
        time.sleep(0.02)
        return timed(100.0 + n)

    machine.measure = measure
    done, notes = tune_all(store, machine, JOBS[:1], 3, trials=30)
    assert notes.begun == JOBS[:1]
    assert done[0].done == 30
    trials = [(device, r.instance.config) for device, r in machine.on if isinstance(r, Measure)][:30]
    assert len({config for _, config in trials}) == 30  # no config twice
    assert min(Counter(device for device, _ in trials).values()) >= 5


def test_the_next_job_is_compiled_while_one_is_measured(store: Store, machine: Machine) -> None:
    ahead = threading.Event()
    second: list[KernelConfig] = []

    def compile(config: KernelConfig, n: int) -> Reply:
        if n == 4:  # the first job has only four configs
            ahead.set()
        second.append(config)
        return Reply(Outcome.OK, resources=FINE)

    def measure(config: KernelConfig, n: int) -> Reply:
        assert n > 0 or ahead.wait(20)
        return timed(100.0 + n)

    machine.compile, machine.measure = compile, measure
    done, _ = tune_all(store, machine, JOBS[:2], 1, trials=4)
    assert [progress.outcomes for progress in done] == [{"ok": 4}] * 2


def test_equal_sources_are_not_compiled_concurrently(store: Store, machine: Machine) -> None:
    """Buckets of a spec share sources: the second compilation waits, and then hits Triton's cache."""
    at_work: Counter[KernelConfig] = Counter()
    most: Counter[KernelConfig] = Counter()

    def compile(config: KernelConfig, n: int) -> Reply:
        with machine.lock:
            at_work[config] += 1
            most[config] = max(most[config], at_work[config])
        time.sleep(0.01)
        with machine.lock:
            at_work[config] -= 1
        return Reply(Outcome.OK, resources=FINE)

    machine.compile = compile
    tune_all(store, machine, JOBS, len(JOBS), trials=12, compilers=8)
    assert max(Counter(machine.compiled).values()) > 1
    assert max(most.values()) == 1


def test_a_failed_trial_affects_no_other(store: Store, machine: Machine) -> None:
    bad = {config for n, config in enumerate(every_config(JOBS[0].spec, GPU)) if n % 2}
    machine.measure = lambda config, n: Reply(Outcome.CRASH, "fell off the bus") if config in bad else timed(100.0 + n)
    done, _ = tune_all(store, machine, JOBS[:2], 2, trials=20)
    for progress in done:
        results = store.results(progress.job.place)
        assert len(results) == progress.done == 20
        assert {r.config for r in results if r.outcome == "crash"} == {r.config for r in results} & bad
        assert len(progress.outcomes) == 2


# -- interleaved finals


def finals(store: Store, machine: Machine, long: list[float]) -> list[MeasureInterleaved]:
    """Tune a job whose configs take the times in `long` when timed as finalists, and 20 us less in trials."""
    configs = machine.compiled

    def measure(config: KernelConfig, n: int) -> Reply:
        us = long[configs.index(config)]
        return timed(us if machine.measured[n].timed_ms > TRIAL_MS else us - 20)

    machine.measure = measure
    tune_all(store, machine, JOBS[:1], 1, trials=len(long), compilers=1)
    return machine.interleaved_requests


def test_close_finalists_are_interleaved(store: Store, machine: Machine) -> None:
    times = {0: 110.0, 2: 109.0, 3: 108.0}
    machine.interleaved = lambda request: Reply(
        Outcome.OK, timings=tuple(timing(times[machine.compiled.index(i.config)]) for i in request.instances)
    )
    (interleaved,) = finals(store, machine, [100.0, 150.0, 101.0, 101.9, 103.0])
    assert [machine.compiled.index(i.config) for i in interleaved.instances] == [0, 2, 3]
    result = [(machine.compiled.index(r.config), r.time_us) for r in store.results(JOBS[0].place)]
    # The card ran a tenth slower meanwhile, which must not affect configs that were not interleaved.
    assert [n for n, _ in result] == [3, 2, 0, 4, 1]
    assert [us for _, us in result] == pytest.approx([100 * 108 / 110, 100 * 109 / 110, 100.0, 103.0, 130.0])


def test_a_failed_interleaved_timing_changes_nothing(store: Store, machine: Machine) -> None:
    (interleaved,) = finals(store, machine, [100.0, 101.0])
    assert len(interleaved.instances) == 2
    assert [r.time_us for r in store.results(JOBS[0].place)] == [100.0, 101.0]


def test_a_clear_winner_is_not_interleaved(store: Store, machine: Machine) -> None:
    assert finals(store, machine, [100.0, 100.0 * CLOSE_RATIO + 0.5, 150.0]) == []


def test_only_a_few_finalists_are_interleaved(store: Store, machine: Machine) -> None:
    (interleaved,) = finals(store, machine, [100.0 + n / 100 for n in range(8)])
    assert len(interleaved.instances) == MAX_INTERLEAVED
