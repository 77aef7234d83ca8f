"""The loop that joins search, workers and store: propose, compile in parallel, check and time, write down."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from parallax_gen.errors import usable_cpus
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.tuning.claims import Storage
from parallax_gen.tuning.finals import FINALIST_MS, FINALISTS
from parallax_gen.tuning.job import Job, Progress, known_configs, program_of, proven_configs
from parallax_gen.tuning.run import MOST_SPILLS, Run
from parallax_gen.tuning.workers.pool import Answer, AnyWorker, Pool
from parallax_gen.tuning.workers.worker import Compile, Worker

__all__ = ["FINALISTS", "FINALIST_MS", "MOST_SPILLS", "Job", "Progress", "Tuner", "Watcher", "proven_configs"]

IDLE_S = 0.5  # while nothing happens, a watcher is called as often


class Watcher(Protocol):
    """Who is told how jobs stand. What it raises ends the tune: every finished trial is stored by then."""

    def begin(self, job: Job) -> None:
        """A device has begun with a job."""

    def update(self, progress: Progress) -> None:
        """A trial of a job has ended; or some time passed without one."""

    def end(self, progress: Progress) -> None:
        """A job is done."""


def start_benches(devices: Sequence[int]) -> dict[int, Worker]:
    """Children that measure, one a device of those that this process may use; for a Tuner, or to ask for their GPU."""
    benches = {device: Worker(device=device) for device in devices}
    for bench in benches.values():
        bench.start()
    return benches


def start_compilers(count: int | None, devices: int) -> list[Worker]:
    """Children that compile, for a Tuner: by default one a CPU that this process may use, but for one a device."""
    compilers = [Worker(device=None) for _ in range(count or max(1, usable_cpus() - max(1, devices)))]
    for compiler in compilers:
        compiler.start()
    return compilers


class Tuner:
    """Tunes jobs, one a device at a time. A context: it owns the child processes, and leaving it ends them.

    measure=False compiles and predicts only, and needs no GPU. benches: the children that measure, by the index of
    their device; the first device's where none are given. compilers: those that compile, or how many to start. The
    tuner owns all of them from then on. refresh: what is known, where that alone is timed again (tuning/job.py).
    """

    def __init__(
        self,
        store: Store,
        *,
        measure: bool,
        benches: Mapping[int, AnyWorker] | None = None,
        compilers: Sequence[AnyWorker] | int | None = None,
        storage: Storage | None = None,
        refresh: Memory | None = None,
    ):
        self._store, self._measure, self._storage, self._refresh = store, measure, storage, refresh
        self._benches = dict(benches or start_benches([0])) if measure else {}
        if compilers is None or isinstance(compilers, int):
            compilers = start_compilers(compilers, len(self._benches))
        self._pool = Pool(self._benches, compilers)
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
        ahead = max(len(self._benches), self._pool.compilers // 2 if self._refresh else 1)
        return _Floor(self._pool, runs, list(self._benches), ahead).work(time_budget_s, watcher)

    def _run(self, job: Job, trials: int) -> Run:
        if self._refresh is not None:
            again = known_configs(job, self._refresh)[: max(trials, 2)]  # what calls get now, and the default
            results = self._refresh.results
            return Run(job, self._store, measure=self._measure, trials=len(again), again=again, results=results)
        # A prediction would keep those who can measure from the config.
        board = self._storage.board(job.place, program_of(job)) if self._storage is not None and self._measure else None
        return Run(job, self._store, measure=self._measure, trials=trials, board=board)


class _Floor:
    """Where runs and devices meet: which run has which device, and which is next."""

    def __init__(self, pool: Pool, runs: Iterator[tuple[int, Run]], devices: Sequence[int], ahead: int):
        """`ahead`: of so many runs that no device has yet the configs are compiled."""
        self._pool, self._to_come, self._most_ahead = pool, runs, ahead
        self._measure = bool(devices)
        self._ahead: deque[tuple[int, Run]] = deque()  # no device has them yet; their configs are compiled
        self._running: dict[int, Run] = {}
        self._done: dict[int, Progress] = {}
        self._run_of: dict[int | None, int | None] = dict.fromkeys(devices or (None,))
        self._busy: set[int] = set()

    def work(self, time_budget_s: float, watcher: Watcher) -> list[Progress]:
        try:
            while True:
                self._give_devices_runs(time_budget_s, watcher)
                self._compile_ahead()
                self._give_devices_work()
                if self._end_runs(watcher):
                    continue
                if not self._running:
                    return [self._done[number] for number in sorted(self._done)]
                self._wait(watcher)
        finally:
            for run in [*self._running.values(), *(run for _, run in self._ahead)]:
                run.close()

    def _wait(self, watcher: Watcher) -> None:
        """Until something happened, or for a moment."""
        answer = self._pool.next(IDLE_S)
        if answer is None:
            for run in self._running.values():
                watcher.update(run.progress)
        elif self._take(answer) and answer.owner in self._running:
            watcher.update(self._running[answer.owner].progress)
        for run in [*self._running.values(), *(run for _, run in self._ahead)]:
            run.keep_up()

    def _give_devices_runs(self, seconds: float, watcher: Watcher) -> None:
        """Every device that has no run gets the next one; the last ones are shared."""
        for device in [device for device, run in self._run_of.items() if run is None]:
            number, run = self._ahead.popleft() if self._ahead else next(self._to_come, (None, None))
            if number is not None and run is not None:
                self._running[number] = run
                run.begin(seconds)
                watcher.begin(run.job)
            else:
                hands = list(self._run_of.values())
                number = min((n for n, run in self._running.items() if run.searching), key=hands.count, default=None)
            self._run_of[device] = number

    def _give_devices_work(self) -> None:
        for device, number in self._run_of.items():
            if device is not None and number is not None and device not in self._busy:
                request = self._running[number].next_request()
                if request is not None:
                    self._busy.add(device)
                    self._pool.measure(number, device, request)

    def _end_runs(self, watcher: Watcher) -> bool:
        """Whether a run was over."""
        over = [number for number, run in self._running.items() if run.over]
        for number in over:
            run = self._running.pop(number)
            run.close()
            self._pool.forget(number)
            self._done[number] = run.progress
            self._run_of.update({device: None for device, its in self._run_of.items() if its == number})
            watcher.end(run.progress)
        return bool(over)

    def _compile_ahead(self) -> None:
        """Keep twice as many configs of each run under way as there are compilers; also of the devices' next runs."""
        if self._measure and len(self._ahead) < self._most_ahead:
            self._ahead.extend(itertools.islice(self._to_come, 1))
        for number, run in [*self._running.items(), *self._ahead]:
            while run.waiting < 2 * self._pool.compilers and (asked := run.ask()) is not None:
                self._pool.compile(number, *asked)

    def _take(self, answer: Answer) -> bool:
        """Pass an answer on. Whether a trial has ended with it."""
        if answer.device is not None:
            self._busy.remove(answer.device)
        run = self._running.get(answer.owner) or dict(self._ahead)[answer.owner]
        if isinstance(answer.request, Compile):
            return run.compiled(answer.request.trial.config, answer.outcome)
        return run.measured(answer.request, answer.outcome)


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
