"""Assigns runs to devices, and work to devices and compilers."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from parallax_gen.tuning.job import Job, Progress
from parallax_gen.tuning.job_run import JobRun
from parallax_gen.tuning.workers.messages import Compile
from parallax_gen.tuning.workers.pool import CompletedRequest, Pool

IDLE_S = 0.5  # how often a watcher is called while nothing happens


class Watcher(Protocol):
    """Receives the progress of jobs.

    An exception raised by it ends the tune; every finished trial is stored by then.
    """

    def begin(self, job: Job) -> None:
        """A device began a job."""

    def update(self, progress: Progress) -> None:
        """A trial of a job ended, or some time passed without one."""

    def end(self, progress: Progress) -> None:
        """A job ended."""


class Scheduler:
    """Assigns a run to every device, and work to the measuring workers and the compilers."""

    def __init__(self, pool: Pool, runs: Iterator[tuple[int, JobRun]], devices: Sequence[int], compile_ahead_runs: int):
        """compile_ahead_runs: how many runs without a device have their configs compiled in advance."""
        self._pool, self._upcoming, self._compile_ahead_runs = pool, runs, compile_ahead_runs
        self._measure = bool(devices)
        self._ahead: deque[tuple[int, JobRun]] = deque()  # runs without a device, whose configs are being compiled
        self._running: dict[int, JobRun] = {}
        self._done: dict[int, Progress] = {}
        self._run_of_device: dict[int | None, int | None] = dict.fromkeys(devices or (None,))
        self._busy: set[int] = set()

    def run_all(self, time_budget_s: float, watcher: Watcher) -> list[Progress]:
        """Execute all runs and return their progress, in order. A run's time budget starts when it gets a device."""
        try:
            while True:
                self._assign_runs(time_budget_s, watcher)
                self._compile_ahead()
                self._assign_requests()
                if self._end_runs(watcher):
                    continue
                if not self._running:
                    return [self._done[number] for number in sorted(self._done)]
                self._wait(watcher)
        finally:
            for run in [*self._running.values(), *(run for _, run in self._ahead)]:
                run.close()

    def _wait(self, watcher: Watcher) -> None:
        """Wait for a completed request, at most IDLE_S."""
        completed = self._pool.next(IDLE_S)
        if completed is None:
            for run in self._running.values():
                watcher.update(run.progress)
        elif self._deliver(completed) and completed.owner in self._running:
            watcher.update(self._running[completed.owner].progress)
        for run in [*self._running.values(), *(run for _, run in self._ahead)]:
            run.heartbeat()

    def _assign_runs(self, seconds: float, watcher: Watcher) -> None:
        """Give each device without a run the next one. Once no new run is left, devices share the remaining runs."""
        for device in [device for device, run in self._run_of_device.items() if run is None]:
            number, run = self._ahead.popleft() if self._ahead else next(self._upcoming, (None, None))
            if number is not None and run is not None:
                self._running[number] = run
                run.begin(seconds)
                watcher.begin(run.job)
            else:
                assigned = list(self._run_of_device.values())
                number = min((n for n, run in self._running.items() if run.searching), key=assigned.count, default=None)
            self._run_of_device[device] = number

    def _assign_requests(self) -> None:
        for device, number in self._run_of_device.items():
            if device is not None and number is not None and device not in self._busy:
                request = self._running[number].next_request()
                if request is not None:
                    self._busy.add(device)
                    self._pool.measure(number, device, request)

    def _end_runs(self, watcher: Watcher) -> bool:
        """End the runs that are over. Returns whether there were any."""
        over = [number for number, run in self._running.items() if run.over]
        for number in over:
            run = self._running.pop(number)
            run.close()
            self._pool.forget(number)
            self._done[number] = run.progress
            self._run_of_device.update(
                {device: None for device, its_run in self._run_of_device.items() if its_run == number}
            )
            watcher.end(run.progress)
        return bool(over)

    def _compile_ahead(self) -> None:
        """Keep twice as many configs of each run in flight as there are compilers. Includes the runs ahead."""
        if self._measure and len(self._ahead) < self._compile_ahead_runs:
            self._ahead.extend(itertools.islice(self._upcoming, 1))
        for number, run in [*self._running.items(), *self._ahead]:
            while run.in_flight < 2 * self._pool.compilers and (request := run.next_compile()) is not None:
                self._pool.compile(number, *request)

    def _deliver(self, completed: CompletedRequest) -> bool:
        """Pass a completed request on to its run. Returns whether it ended a trial."""
        if completed.device is not None:
            self._busy.remove(completed.device)
        run = self._running.get(completed.owner) or dict(self._ahead)[completed.owner]
        if isinstance(completed.request, Compile):
            return run.on_compiled(completed.request.instance.config, completed.reply)
        return run.on_measured(completed.request, completed.reply)
