"""The finals of a job: a lucky short timing does not win. The best are timed again, and the nearest in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from parallax_gen.memory.bounds import truncated_detail
from parallax_gen.memory.ranking import fastest
from parallax_gen.memory.result import Result, now
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.work import bound_by_matmuls
from parallax_gen.tuning.workers.messages import Measure, Rematch, Request, Timing, Trial, TrialResult

FINALISTS, FINALIST_MS = 8, 60.0  # at most so many are timed again, for longer: a short timing is off by 1 or 2 %
CLOSE, IN_TURNS = 1.02, 3  # of them at most so many, within this of the best, are timed once more, in turns
CLOSE_BRIEFLY = 1.05  # as CLOSE, where they were timed briefly, and busy cards run slower


class Finals:
    """What is to be measured after a job's trials, one request at a time.

    The best is timed once more until the best is one that was; then it is timed in turns with those that come close,
    so that clocks and heat are the same for all of them. Every time replaces the one before in the store. Those of the
    turns are put to the scale of the best's time before: they decide among those who took part, and a card that
    meanwhile runs faster or slower does not decide between them and the others. The default takes part: what it takes
    longer is what tuning is worth.

    Of a refresh all configs were timed just now, though briefly: they go straight into the turns, whose times are kept.
    """

    def __init__(
        self,
        op: str,
        known: Callable[[], list[Result]],
        trial: Callable[[KernelConfig], Trial],
        default: KernelConfig,
        refreshed: Iterable[KernelConfig] = (),
    ):
        """`known`: what is known of the job's kernels as they are today, the measured first, from fast to slow."""
        self._known, self._trial, self._default = known, trial, default
        self._from_rest = bound_by_matmuls(op)
        self._again = set(refreshed)
        self._briefly = bool(self._again)
        self._most = len(self._again) + FINALISTS
        self.over = False

    def next_request(self) -> Request | None:
        """What to measure next; None once all is done."""
        best = None if self.over else next(iter(fastest(self._known())), None)
        if best is not None and best.config not in self._again and len(self._again) < self._most:
            self._again.add(best.config)
            return Measure(self._trial(best.config), timed_ms=FINALIST_MS, from_rest=self._from_rest)
        close = [] if self.over else self._close()
        self.over = True  # but for the rematch's answer
        if len(close) > 1:
            return Rematch(tuple(self._trial(r.config) for r in close), FINALIST_MS, self._from_rest)
        return None

    def measured(self, request: Request, reply: TrialResult) -> list[Result]:
        """What to record of what came of a request."""
        before = {r.config: r for r in self._known()}
        if not isinstance(request, Rematch):
            old = before[request.trial.config]
            again = replace(old, outcome=reply.outcome, error=reply.error, detail=truncated_detail(reply.detail))
            return [_timed(again, reply.timing)]
        if reply.outcome.failed:
            return []
        was = before[request.trials[0].config].time_us
        assert was is not None
        scale = 1.0 if self._briefly else was / reply.timings[0].median_us
        timings = zip(request.trials, reply.timings, strict=True)
        return [_timed(before[trial.config], timing, scale) for trial, timing in timings]

    def _close(self) -> list[Result]:
        """The best and those within CLOSE of it, if the best was timed again; and the default, if it was measured."""
        measured = [(r, r.time_us) for r in fastest(self._known()) if r.time_us is not None]
        if not measured or measured[0][0].config not in self._again:
            return []
        most = (CLOSE_BRIEFLY if self._briefly else CLOSE) * measured[0][1]
        close = [r for r, time_us in measured if time_us <= most and r.config in self._again][:IN_TURNS]
        default = next((r for r, _ in measured if r.config == self._default), None)
        return close if default is None or default in close else [*close, default]


def _timed(result: Result, timing: Timing | None, scale: float = 1.0) -> Result:
    return replace(
        result,
        time_us=timing.median_us * scale if timing else None,
        time_us_p20=timing.p20_us * scale if timing else None,
        time_us_p80=timing.p80_us * scale if timing else None,
        created_at=now(),
    )
