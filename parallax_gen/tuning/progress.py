"""Shows progress: live on a terminal or in a notebook, otherwise as occasional lines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.text import Text

from parallax_gen.describe import brief, format_counts, time_and_rate
from parallax_gen.memory.descriptions import shape_of
from parallax_gen.memory.result import Result
from parallax_gen.tuning.plan import TimeLeft

if TYPE_CHECKING:
    from parallax_gen.tuning.job import Job, Progress

MAX_SILENCE_S = 15.0  # without a terminal, the longest time between lines
BAR = 30  # characters of the bar over all jobs


def progress_console(*, quiet: bool = False) -> Console:
    """Standard error, or the cell of a notebook. Text is printed literally; nothing if quiet."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False, quiet=quiet)


def is_live(console: Console) -> bool:
    """Whether a console can show what changes: a terminal, or a notebook with ipywidgets, which rich needs there."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


class CompileProgress:
    """A context that shows how many of `total` kernels are compiled: `advance` after each."""

    def __init__(self, console: Console, total: int):
        columns = TextColumn("compiling"), BarColumn(BAR), MofNCompleteColumn(), TimeElapsedColumn()
        self._bar = ProgressBar(*columns, console=console, transient=True, disable=not is_live(console))
        self._task = self._bar.add_task("compiling", total=total)
        if self._bar.disable and total:
            console.print(f"compiling {total} kernel{'s' * (total > 1)}")

    def __enter__(self) -> CompileProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:  # stopped, a disabled bar prints an empty line before rich 14.3
            self._bar.stop()

    def advance(self) -> None:
        self._bar.advance(self._task)


class ProgressView:
    """A context manager and a watcher of the tuner: `begin` a job, `update` after a trial, `end` it. Jobs may overlap.

    after_update  called at the end of each update
    devices       how many jobs run at a time
    """

    def __init__(
        self,
        console: Console,
        total: int,
        trials: int,
        time_budget_s: float,
        after_update: Callable[[], None] = lambda: None,
        devices: int = 1,
    ):
        self._console = console
        self._left = TimeLeft(total, time_budget_s, devices)
        self._trials, self._budget_s = trials, time_budget_s
        self._after_update = after_update
        self._running: dict[Job, _Running] = {}
        self._live = Live(console=console, get_renderable=self._panel, transient=True) if is_live(console) else None

    def __enter__(self) -> ProgressView:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def begin(self, job: Job) -> None:
        self._left.begin()
        self._running[job] = _Running(self._left.begun, self._budget_s)
        self._print(f"[{self._left.begun}/{self._left.jobs}] {job.gpu.name}: {job.spec}; {job.bucket}")

    def update(self, progress: Progress) -> None:
        running = self._running[progress.job]
        is_first, running.progress = running.progress is None, progress
        if is_first and progress.known:
            self._print(
                f"{self._prefix(running)}{progress.known} configs have results of earlier tunes: continuing from these"
            )
        if self._live is None and progress.done and running.should_print(progress):
            running.last_line, running.shown_best = time.monotonic(), progress.best
            left = running.seconds_left()
            self._print(f"{self._prefix(running)}trial {progress.done}, {left:.0f} s left: {best_text(progress)}")
        self._after_update()

    def end(self, progress: Progress) -> None:
        running = self._running.pop(progress.job)
        prefix = self._prefix(running)
        self._left.end(time.monotonic() - running.begun)
        outcomes = format_counts(progress.outcomes) or "no config left to try"
        if progress.other_tuners:
            outcomes += f", and {progress.other_tuners} by other tuners"
        trials = f"{progress.done} trial{'s' * (progress.done != 1)}"
        self._print(f"{prefix}{trials} in {progress.seconds:.0f} s: {outcomes}; {best_text(progress)}")
        if self._live is None and self._left.ended < self._left.jobs:
            self._print(self._all_jobs())

    def _all_jobs(self) -> str:
        return self._left.text([running.seconds_left() for running in self._running.values()])

    def _prefix(self, running: _Running) -> str:
        """The prefix of a line: the job's number if several jobs run."""
        return "  " if len(self._running) < 2 else f"  [{running.number}] "

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=not self._console.is_terminal)

    def _panel(self) -> Group:
        """The live panel, redrawn several times a second so that the time left counts down."""
        filled = round(BAR * self._left.ended / self._left.jobs)
        bar = "━" * filled + "─" * (BAR - filled)
        lines = [f"{bar} {self._all_jobs()}"] if self._left.jobs > 1 else []
        for running in list(self._running.values()):
            progress, prefix = running.progress, self._prefix(running)
            outcomes = format_counts(progress.outcomes) if progress else ""
            done = progress.done if progress else 0
            lines += [
                f"{prefix}trials {done}/{self._trials}  {outcomes}",
                f"{prefix}{best_text(progress) if progress else 'compiling the first configs'}",
                f"{prefix}{running.seconds_left():.0f} of {self._budget_s:.0f} s left",
            ]
        return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


@dataclass
class _Running:
    """A running job, and what was last printed about it."""

    number: int
    budget_s: float
    begun: float = field(default_factory=time.monotonic)
    last_line: float = field(default_factory=time.monotonic)
    shown_best: Result | None = None
    progress: Progress | None = None

    def seconds_left(self) -> float:
        if self.progress is None or math.isinf(self.progress.deadline):  # nothing is measured yet
            return self.budget_s
        return max(0.0, self.progress.deadline - time.monotonic())

    def should_print(self, progress: Progress) -> bool:
        return progress.best != self.shown_best or time.monotonic() - self.last_line > MAX_SILENCE_S


def best_text(progress: Progress) -> str:
    """`best 123.4 us, 512.3 TFLOP/s, M128 ...`, and whether it is only predicted."""
    best = progress.best
    if best is None or best.time_us is None:
        return "no working config so far"
    text = f"{time_and_rate(best.place.spec, shape_of(best), best.time_us)}, {brief(best.config)}"
    return f"best {text}" if best.measured else f"best predicted {text}"
