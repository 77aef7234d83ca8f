"""The finals of a job: time the fastest configs again, the closest ones interleaved, so that no lucky timing wins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from parallax_gen.memory.bounds import truncated_detail
from parallax_gen.memory.ranking import fastest
from parallax_gen.memory.result import Result, now
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.work import bound_by_matmuls
from parallax_gen.tuning.workers.messages import (
    KernelInstance,
    Measure,
    MeasureInterleaved,
    Reply,
    Timing,
    WorkerRequest,
)

# At most MAX_FINALISTS configs are timed again, for FINALIST_MS: a short timing is off by 1 or 2 %. At most
# MAX_INTERLEAVED of them, those within CLOSE_RATIO of the best, are then timed once more, interleaved.
MAX_FINALISTS, FINALIST_MS = 8, 60.0
CLOSE_RATIO, MAX_INTERLEAVED = 1.02, 3
# A refresh times briefly and on a hot card, so its times scatter more.
CLOSE_RATIO_AFTER_REFRESH = 1.05


class Finals:
    """Requests to measure a job's fastest configs again after its trials, one at a time.

    Times the fastest config again until the fastest is one that was already timed again. Then times it interleaved
    with the configs close to it, so that clocks and temperature are the same for all of them. Each new time replaces
    the stored one. The interleaved times are scaled so that the best keeps its time: so these configs do not
    overtake others, or fall behind them, because the card ran faster or slower meanwhile. The default is interleaved
    too, because its time shows what tuning gained.

    After a refresh, which has just timed its configs, the closest are interleaved at once, unscaled.
    """

    def __init__(
        self,
        op: str,
        current_results: Callable[[], list[Result]],
        instance: Callable[[KernelConfig], KernelInstance],
        default: KernelConfig,
        refreshed: Iterable[KernelConfig] = (),
    ):
        """current_results: returns the results of the job's current kernels, measured ones first, from fast to slow."""
        self._current_results, self._instance, self._default = current_results, instance, default
        self._in_bursts = bound_by_matmuls(op)
        self._retimed = set(refreshed)
        self._after_refresh = bool(self._retimed)
        self._max_retimed = len(self._retimed) + MAX_FINALISTS
        self.over = False

    def next_request(self) -> WorkerRequest | None:
        """The next request; None once all is done."""
        best = None if self.over else next(iter(fastest(self._current_results())), None)
        if best is not None and best.config not in self._retimed and len(self._retimed) < self._max_retimed:
            self._retimed.add(best.config)
            return Measure(self._instance(best.config), timed_ms=FINALIST_MS, in_bursts=self._in_bursts)
        close = [] if self.over else self._closest()
        self.over = True  # once the reply to this request is here
        if len(close) > 1:
            return MeasureInterleaved(tuple(self._instance(r.config) for r in close), FINALIST_MS, self._in_bursts)
        return None

    def results_of(self, request: WorkerRequest, reply: Reply) -> list[Result]:
        """The results to store for the reply to a request."""
        current = {r.config: r for r in self._current_results()}
        if not isinstance(request, MeasureInterleaved):
            old = current[request.instance.config]
            retimed = replace(old, outcome=reply.outcome, error=reply.error, detail=truncated_detail(reply.detail))
            return [_timed(retimed, reply.timing)]
        if reply.outcome.failed:
            return []
        best_us = current[request.instances[0].config].time_us
        assert best_us is not None
        scale = 1.0 if self._after_refresh else best_us / reply.timings[0].median_us
        timings = zip(request.instances, reply.timings, strict=True)
        return [_timed(current[instance.config], timing, scale) for instance, timing in timings]

    def _closest(self) -> list[Result]:
        """The best result, those within CLOSE_RATIO of it and the default's; empty unless the best was timed again."""
        measured = [(r, r.time_us) for r in fastest(self._current_results()) if r.time_us is not None]
        if not measured or measured[0][0].config not in self._retimed:
            return []
        max_us = (CLOSE_RATIO_AFTER_REFRESH if self._after_refresh else CLOSE_RATIO) * measured[0][1]
        close = [r for r, time_us in measured if time_us <= max_us and r.config in self._retimed][:MAX_INTERLEAVED]
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
