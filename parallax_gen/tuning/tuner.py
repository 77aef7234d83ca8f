"""Tunes jobs: starts and owns the children that compile and measure, and makes a run of each job."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.tuning.claims import Storage
from parallax_gen.tuning.job import Job, Progress, known_configs, program_of
from parallax_gen.tuning.run import Run
from parallax_gen.tuning.scheduler import Scheduler, Watcher
from parallax_gen.tuning.workers.pool import AnyWorker, Pool, usable_cpus
from parallax_gen.tuning.workers.worker import Worker


def start_measuring_workers(devices: Sequence[int]) -> dict[int, Worker]:
    """Children that measure, one a device of those that this process may use; for a Tuner, or to ask for their GPU."""
    workers = {device: Worker(device=device) for device in devices}
    for worker in workers.values():
        worker.start()
    return workers


def start_compilers(count: int | None, devices: int) -> list[Worker]:
    """Children that compile, for a Tuner: by default one a CPU that this process may use, but for one a device."""
    compilers = [Worker(device=None) for _ in range(count or max(1, usable_cpus() - max(1, devices)))]
    for compiler in compilers:
        compiler.start()
    return compilers


@contextmanager
def children(devices: Sequence[int], compilers: int | None) -> Iterator[tuple[dict[int, Worker], list[Worker]]]:
    """What `start_measuring_workers` and `start_compilers` start. Leaving ends them."""
    with ExitStack() as stack:
        measuring = start_measuring_workers(devices)
        for worker in measuring.values():
            stack.callback(worker.close)
        compiling = start_compilers(compilers, len(devices))
        for worker in compiling:
            stack.callback(worker.close)
        yield measuring, compiling


class Tuner:
    """Tunes jobs, one a device at a time. A context: it owns the child processes, and leaving it ends them.

    measure=False compiles and predicts only, and needs no GPU. measuring: the children that measure, by the index of
    their device; the first device's where none are given. compilers: those that compile, or how many to start. The
    tuner owns all of them from then on. refresh: what is known, where that alone is timed again (tuning/job.py).
    """

    def __init__(
        self,
        store: Store,
        *,
        measure: bool,
        measuring: Mapping[int, AnyWorker] | None = None,
        compilers: Sequence[AnyWorker] | int | None = None,
        storage: Storage | None = None,
        refresh: Memory | None = None,
    ):
        self._store, self._measure, self._storage, self._refresh = store, measure, storage, refresh
        self._measuring = dict(measuring or start_measuring_workers([0])) if measure else {}
        if compilers is None or isinstance(compilers, int):
            compilers = start_compilers(compilers, len(self._measuring))
        self._pool = Pool(self._measuring, compilers)
        self._runs = 0  # of all calls so far: an answer names its run by number

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def tune(self, job: Job, *, trials: int, time_budget_s: float, on_progress: Callable[[Progress], None]) -> Progress:
        """As `tune_all`, of one job. on_progress is called after each trial, twice a second without one, and last."""
        (progress,) = self.tune_all([job], trials=trials, time_budget_s=time_budget_s, watcher=_Calls(on_progress))
        return progress

    def tune_all(self, jobs: Sequence[Job], *, trials: int, time_budget_s: float, watcher: Watcher) -> list[Progress]:
        """Try configs of every job until there were `trials` of them, or its seconds are spent, or none is left.

        Each device takes a job at a time, and the seconds count from then; where there are fewer jobs than devices,
        several share one. While a job is measured, the next one's configs are compiled. Every outcome is stored as it
        comes: an interrupt loses nothing, and the next tune goes on from there. Raises MachineError where the machine
        is at fault; what failed by it is not stored, and tried again by the next tune.
        """
        numbers = itertools.count(self._runs)
        self._runs += len(jobs)
        # Made when they are needed: what is known of a place is read from the store then.
        runs = ((next(numbers), self._run(job, trials)) for job in jobs)
        # Of a refresh few configs are compiled a job: the compilers have work from several.
        ahead = max(len(self._measuring), self._pool.compilers // 2 if self._refresh else 1)
        return Scheduler(self._pool, runs, list(self._measuring), ahead).run_all(time_budget_s, watcher)

    def _run(self, job: Job, trials: int) -> Run:
        if self._refresh is not None:
            again = known_configs(job, self._refresh)[: max(trials, 2)]  # what calls get now, and the default
            results = self._refresh.results
            return Run(job, self._store, measure=self._measure, trials=len(again), again=again, results=results)
        # A prediction would keep those who can measure from the config.
        board = self._storage.board(job.place, program_of(job)) if self._storage is not None and self._measure else None
        return Run(job, self._store, measure=self._measure, trials=trials, board=board)


class _Calls:
    """A watcher of one job that calls a function."""

    def __init__(self, on_progress: Callable[[Progress], None]):
        self._on_progress = on_progress

    def begin(self, job: Job) -> None:
        pass

    def update(self, progress: Progress) -> None:
        self._on_progress(progress)

    def end(self, progress: Progress) -> None:
        self._on_progress(progress)
