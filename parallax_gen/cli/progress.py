"""Tells on standard error how a tune stands: live on a terminal, otherwise a line when there is something to say."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from parallax_gen.cli.text import brief, counted, time_and_rate
from parallax_gen.memory.results import Result

if TYPE_CHECKING:
    from parallax_gen.tuning.tune import Job, Progress

QUIET_S = 15.0  # without a terminal: no longer than this without a line


class View:
    """A context. `begin` a job, `update` after every trial, `end` the job."""

    def __init__(self, console: Console, total: int, trials: int, time_budget_s: float):
        self._console = console
        self._total, self._trials, self._budget_s = total, trials, time_budget_s
        self._number = 0
        self._title = ""
        self._start = self._last_line = 0.0
        self._progress: Progress | None = None
        self._told_best: Result | None = None
        self._live = Live(console=console, get_renderable=self._panel, transient=True) if console.is_terminal else None

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def begin(self, job: Job) -> None:
        self._number += 1
        self._title = f"[{self._number}/{self._total}] {job.gpu.name}: {job.spec}; {job.bucket}"
        self._start = self._last_line = time.monotonic()
        self._progress = self._told_best = None
        self._say(self._title)

    def update(self, progress: Progress) -> None:
        first = self._progress is None
        self._progress = progress
        if first and progress.known:
            self._say(f"  {progress.known} configs are known from earlier runs: going on from there")
        if self._live is None and progress.done and self._worth_a_line(progress):
            self._last_line, self._told_best = time.monotonic(), progress.best
            self._say(f"  trial {progress.done}, {self._seconds_left():.0f} s left: {best_of(progress)}")

    def end(self, progress: Progress) -> None:
        outcomes = counted(progress.kinds) or "no config left to try"
        self._say(f"  {progress.done} trials in {progress.seconds:.0f} s: {outcomes}; {best_of(progress)}")

    def _worth_a_line(self, progress: Progress) -> bool:
        return progress.best != self._told_best or time.monotonic() - self._last_line > QUIET_S

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)

    def _seconds_left(self) -> float:
        return max(0.0, self._start + self._budget_s - time.monotonic())

    def _panel(self) -> Group:
        """Drawn some times a second, so that the seconds run."""
        progress = self._progress
        kinds = counted(progress.kinds) if progress else ""
        done = progress.done if progress else 0
        lines = [
            f"  trials {done}/{self._trials}  {kinds}",
            f"  {best_of(progress) if progress else 'compiling the first configs'}",
            f"  {self._seconds_left():.0f} of {self._budget_s:.0f} s left",
        ]
        return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


def best_of(progress: Progress) -> str:
    """`best 123.4 us, 512.3 TFLOP/s, M128 ...`, and whether it is only predicted."""
    best = progress.best
    if best is None or best.time_us is None:
        return "none works so far"
    told = f"{time_and_rate(best.key.spec, progress.job.shape, best.time_us)}, {brief(best.config)}"
    return f"best {told}" if best.measured else f"best predicted {told}"
