"""Which run has which device, and what devices and compilers do next."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from parallax_gen.tuning.job import Job, Progress
from parallax_gen.tuning.run import Run
from parallax_gen.tuning.workers.messages import Compile
from parallax_gen.tuning.workers.pool import Answer, Pool

IDLE_S = 0.5  # while nothing happens, a watcher is called as often


class Watcher(Protocol):
    """Who is told how jobs stand. What it raises ends the tune: every finished trial is stored by then."""

    def begin(self, job: Job) -> None:
        """A device has begun with a job."""

    def update(self, progress: Progress) -> None:
        """A trial of a job has ended; or some time passed without one."""

    def end(self, progress: Progress) -> None:
        """A job is done."""


class Scheduler:
    """Gives every device a run, and the devices that measure and the children that compile their work."""

    def __init__(self, pool: Pool, runs: Iterator[tuple[int, Run]], devices: Sequence[int], ahead: int):
        """ahead: how many runs that no device has yet are compiled for."""
        self._pool, self._to_come, self._most_ahead = pool, runs, ahead
        self._measure = bool(devices)
        self._ahead: deque[tuple[int, Run]] = deque()  # no device has them yet; their configs are compiled
        self._running: dict[int, Run] = {}
        self._done: dict[int, Progress] = {}
        self._run_of: dict[int | None, int | None] = dict.fromkeys(devices or (None,))
        self._busy: set[int] = set()

    def run_all(self, time_budget_s: float, watcher: Watcher) -> list[Progress]:
        """Until all runs are over; the seconds of each count from when it has a device. Their progress, in order."""
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
                taken = list(self._run_of.values())
                number = min((n for n, run in self._running.items() if run.searching), key=taken.count, default=None)
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
            while run.waiting < 2 * self._pool.compilers and (request := run.ask()) is not None:
                self._pool.compile(number, *request)

    def _take(self, answer: Answer) -> bool:
        """Pass an answer on. Whether a trial has ended with it."""
        if answer.device is not None:
            self._busy.remove(answer.device)
        run = self._running.get(answer.owner) or dict(self._ahead)[answer.owner]
        if isinstance(answer.request, Compile):
            return run.compiled(answer.request.trial.config, answer.reply)
        return run.measured(answer.request, answer.reply)
