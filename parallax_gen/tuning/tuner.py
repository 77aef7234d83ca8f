"""Tunes jobs: starts and owns the child processes that compile and measure, and creates a run for each job."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from parallax_gen.errors import MeasureError
from parallax_gen.memory.commands import NOT_MEASURED
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import UntestedTritonWarning, newer_than_tested
from parallax_gen.tuning.claims import Storage
from parallax_gen.tuning.job import MAX_REFRESHED, Job, Progress, program_key, refresh_configs
from parallax_gen.tuning.job_run import JobRun
from parallax_gen.tuning.scheduler import Scheduler, Watcher
from parallax_gen.tuning.workers.pool import Pool, WorkerProtocol, usable_cpus
from parallax_gen.tuning.workers.visible import visible_devices
from parallax_gen.tuning.workers.worker import Worker


def start_measuring_workers(devices: Sequence[int]) -> dict[int, Worker]:
    """Start one measuring child per device (index among those visible here), for a Tuner or to identify GPUs."""
    workers = {device: Worker(device=device) for device in devices}
    for worker in workers.values():
        worker.start()
    return workers


def start_compilers(count: int | None, devices: int) -> list[Worker]:
    """Start compiling children for a Tuner: by default one per usable CPU, less one per device."""
    compilers = [Worker(device=None) for _ in range(count or max(1, usable_cpus() - max(1, devices)))]
    for compiler in compilers:
        compiler.start()
    return compilers


@contextmanager
def children(
    devices: Sequence[int] | Callable[[Mapping[int, Worker]], Sequence[int]], compilers: int | None
) -> Iterator[tuple[dict[int, Worker], list[Worker]]]:
    """A context with the children of `start_measuring_workers` and `start_compilers`. Leaving it ends them.

    devices  or a function that chooses from the measuring children of all devices here; the others end at once
    """
    with ExitStack() as stack:
        measuring = start_measuring_workers(range(visible_devices()) if callable(devices) else devices)
        for worker in measuring.values():
            stack.callback(worker.close)
        if callable(devices):
            devices = devices(measuring)
            for device in measuring.keys() - set(devices):
                measuring.pop(device).close()
        # As many as CPUs in all, so not before the devices are known.
        compiling = start_compilers(compilers, len(devices))
        for worker in compiling:
            stack.callback(worker.close)
        yield measuring, compiling


class Tuner:
    """Tunes jobs, one per device at a time. A context: it owns the child processes, and leaving it ends them.

    measure    False to only compile and predict, which needs no GPU
    measuring  the measuring children by the index of their device; by default one for the first device
    compilers  the compiling children, or how many to start
    storage    shares the jobs with other tuners
    refresh    for a refresh: the memory that names the few configs to time again (tuning/job.py)

    The tuner owns the given children too, and ends them.
    """

    def __init__(
        self,
        store: Store,
        *,
        measure: bool,
        measuring: Mapping[int, WorkerProtocol] | None = None,
        compilers: Sequence[WorkerProtocol] | int | None = None,
        storage: Storage | None = None,
        refresh: Memory | None = None,
    ):
        if message := newer_than_tested():
            warnings.warn(message, UntestedTritonWarning, stacklevel=2)
        self._store, self._measure, self._storage, self._refresh = store, measure, storage, refresh
        self._measuring = dict(measuring or start_measuring_workers([0])) if measure else {}
        if compilers is None or isinstance(compilers, int):
            compilers = start_compilers(compilers, len(self._measuring))
        self._pool = Pool(self._measuring, compilers)
        self._runs = 0  # created so far, by all calls of `tune_all`: requests name their run by its number

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def tune(self, job: Job, *, trials: int, time_budget_s: float, on_progress: Callable[[Progress], None]) -> Progress:
        """`tune_all` of one job. on_progress is called after each trial, twice a second without one, and at the end."""
        (progress,) = self.tune_all(
            [job], trials=trials, time_budget_s=time_budget_s, watcher=_CallbackWatcher(on_progress)
        )
        return progress

    def tune_all(self, jobs: Sequence[Job], *, trials: int, time_budget_s: float, watcher: Watcher) -> list[Progress]:
        """Try configs of every job until `trials` were tried, its time budget is spent, or none is left.

        Each device takes one job at a time, whose budget starts then; if there are fewer jobs than devices, several
        devices share a job. While a job is measured, the next one's configs are compiled. Every result is stored at
        once: an interrupt loses nothing, and the next tune continues from there. Raises MachineError if the machine is
        at fault; the failed trial is not stored, and the next tune tries it again. Raises MeasureError for an AMD GPU.
        """
        if amd := next((job.gpu for job in jobs if job.gpu.is_amd), None):
            raise MeasureError(f"{amd.title} cannot be tuned: {NOT_MEASURED}")
        numbers = itertools.count(self._runs)
        self._runs += len(jobs)
        # Created lazily: the results of a place are read from the store at that moment.
        runs = ((next(numbers), self._create_run(job, trials)) for job in jobs)
        # With few configs for each job, as in a refresh, compilers work for several jobs at a time.
        few = self._refresh is not None or trials <= MAX_REFRESHED
        compile_ahead_runs = max(len(self._measuring), self._pool.compilers // 2 if few else 1)
        return Scheduler(self._pool, runs, list(self._measuring), compile_ahead_runs).run_all(time_budget_s, watcher)

    def _create_run(self, job: Job, trials: int) -> JobRun:
        if self._refresh is not None:
            # At least the chosen config and the default.
            only_configs = refresh_configs(job, self._refresh)[: max(trials, 2)]
            results = self._refresh.results
            return JobRun(
                job,
                self._store,
                measure=self._measure,
                trials=len(only_configs),
                only_configs=only_configs,
                results=results,
            )
        # Predictions are not shared: they would keep measuring tuners from trying the config.
        claims = (
            self._storage.claims(job.place, program_key(job)) if self._storage is not None and self._measure else None
        )
        return JobRun(job, self._store, measure=self._measure, trials=trials, claims=claims)


class _CallbackWatcher:
    """A watcher of one job that calls a function with its progress."""

    def __init__(self, on_progress: Callable[[Progress], None]):
        self._on_progress = on_progress

    def begin(self, job: Job) -> None:
        pass

    def update(self, progress: Progress) -> None:
        self._on_progress(progress)

    def end(self, progress: Progress) -> None:
        self._on_progress(progress)
