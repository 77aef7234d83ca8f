"""One job being tuned: what is known, what to try next, what came of it, and when it is over."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from parallax_gen.codegen.render import KernelSource, render
from parallax_gen.errors import ConfigError
from parallax_gen.memory.bounds import truncated_detail
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import default_of, evidence_of, fastest, is_current, nearby_seeds, shipped_seeds
from parallax_gen.memory.result import Evidence, Outcome, Result, reading_order, supersedes
from parallax_gen.memory.shipped import load_same_capability
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import KernelConfig, config_to_json
from parallax_gen.ops.space import neighbours, promising_configs
from parallax_gen.tuning.claims import Board
from parallax_gen.tuning.finals import Finals
from parallax_gen.tuning.job import Job, Progress
from parallax_gen.tuning.search.cost_model import guess_us, predict_us
from parallax_gen.tuning.search.search import Search
from parallax_gen.tuning.workers.messages import Compile, Measure, Request, Trial, TrialResult

MOST_SPILLS = 512  # bytes of stack a thread; in the sweeps kernels that spill half as much are far from the best
GIVE_UP = 1.5  # a call this many times slower than the best has lost


class Run:
    """A job's trials, from the first config that is asked for to the last finalist.

    The loop takes configs to compile (`ask`), says what came of them (`compiled`), takes what a device is to measure
    (`next_request`), and says what came of that (`measured`), until the run is `over`. Every outcome is stored as it
    comes. With measure=False a compiled config is predicted, and there is nothing to measure.

    With a board, the job is shared with workers elsewhere: a config is tried by one of them, all know what came of it,
    the trials of all of them count, and the last one to be done times the finalists again.

    With `again`, these configs are all that is tried, whatever is known of them.
    """

    def __init__(
        self,
        job: Job,
        store: Store,
        *,
        measure: bool,
        trials: int,
        board: Board | None = None,
        again: Sequence[KernelConfig] | None = None,
        results: Callable[[Place], list[Result]] | None = None,
    ):
        """results: where they are looked up; by default in the store, into which they are written."""
        self.job = job
        self._results = results or store.results
        self._store, self._measure, self._trials, self._board = store, measure, trials, board
        self._wanted = Outcome.OK if measure else Outcome.PREDICTED
        self._current: dict[tuple[KernelConfig, Evidence], bool] = {}
        self._default = default_of(job.place, job.gpu)
        known = [r for r in self._known() if not (r.is_machine_fault or (measure and not r.outcome.tried))]
        if again is not None:
            known = []
        best = next((r for r in known if r.outcome is self._wanted), None)
        first = self._first(best) if again is None else again
        self._search = Search(job.spec, job.gpu, first, guess=self._guess_us, among=again)
        for result in known:
            self._search.tell(result.config, result.time_us)
        self.progress = Progress(job, known=len(known), best=best)
        self._asked = self._compiling = self._measuring = 0
        self._ready: deque[tuple[KernelConfig, TrialResult]] = deque()  # compiled, and not yet measured
        self._compiled: dict[KernelConfig, TrialResult] = {}  # of those that are being measured
        self._finals = Finals(job.spec.op, self._known, self._trial, self._default, again or ())
        self._elsewhere: list[KernelConfig] = []  # claimed by others when they were proposed
        self._heard: set[KernelConfig] = set()  # what others found
        self._heard_before = 0
        self._hear()
        self._heard_before, self.progress.elsewhere = len(self._heard), 0
        self._some_compiled, self._seconds = False, float("inf")
        self._start = time.monotonic()

    def begin(self, seconds: float) -> None:
        """A device is free for it. Its seconds count from now, or from when there is something to measure."""
        self._start, self._seconds = time.monotonic(), seconds
        if self._some_compiled:
            self.progress.deadline = self._start + seconds

    @property
    def waiting(self) -> int:
        """How many configs were asked for and are not done."""
        return self._compiling + len(self._ready) + len(self._compiled)

    @property
    def searching(self) -> bool:
        """Whether trials are under way or to come."""
        return time.monotonic() < self.progress.deadline and (self._asked < self._trials or self.waiting > 0)

    @property
    def over(self) -> bool:
        """Whether nothing is left to do. What compiles for it still is not waited for."""
        return not self.searching and not self._measuring and (self._finals.over or not self._measure)

    def keep_up(self) -> None:
        """To be called every second or so: tells workers elsewhere that this one is there."""
        if self._board is not None:
            self._board.beat()

    def close(self) -> None:
        """Leave what is not finished to others, and take in what they found."""
        if self._board is not None:
            self._board.release()
            self._hear()

    def ask(self) -> tuple[str, Compile] | None:
        """A config to compile, behind what names its source; None when as many as allowed are out, or none is left."""
        config = self._next_config() if self._asked < self._trials else None
        if config is None:
            if not self._elsewhere:
                self._trials = self._asked
            return None
        self._asked += 1
        self._compiling += 1
        return self._source_of(config), Compile(self._trial(config))

    def compiled(self, config: KernelConfig, reply: TrialResult) -> bool:
        """What came of compiling a config. True if its trial has ended with it: failed, pruned or predicted."""
        self._compiling -= 1
        if not self._some_compiled:  # compilers start up before the first: a short budget is not for that
            self._some_compiled = True
            self.progress.deadline = time.monotonic() + self._seconds
        ended = self._ended_by(reply)
        if ended is None and self._measure:
            self._ready.append((config, reply))
            return False
        estimate = None
        if ended is None:
            assert reply.resources is not None
            ended = TrialResult(Outcome.PREDICTED)
            estimate = predict_us(self.job.spec, config, self.job.timed_shape, self.job.gpu, reply.resources)
        self._note(self._result(config, reply, ended, predicted_us=estimate))
        return True

    def next_request(self) -> Request | None:
        """What a device that is free should measure; None for nothing at present, or at all."""
        request: Request | None = None
        if self.searching:
            if self._ready:
                config, self._compiled[config] = self._ready.popleft()
                # The default is never given up: what tuning is worth is told by its time.
                give_up_us = float("inf") if config == self._default else GIVE_UP * self._best_us
                request = Measure(self._trial(config), give_up_us)
        elif self._measure and not self._measuring:
            self._finals.over |= self._board is not None and self._board.others_at_work()
            request = self._finals.next_request()
        self._measuring += request is not None
        return request

    def measured(self, request: Request, reply: TrialResult) -> bool:
        """What came of measuring. True if a trial has ended with it, False of finals."""
        self._measuring -= 1
        if isinstance(request, Measure) and request.trial.config in self._compiled:
            config = request.trial.config
            self._note(self._result(config, self._compiled.pop(config), reply))
            return True
        for result in self._finals.measured(request, reply):
            result = replace(result, evidence=self._evidence_of(result.config))  # an old row may have another
            self._store.save(result)
            if self._board is not None:
                self._board.publish(result)
        self.progress.best = self._best_measured
        return False

    def _first(self, best: Result | None) -> list[KernelConfig]:
        """What to try before the search proposes: the default, what was fast elsewhere, and what is near the best.

        The guess that the search begins with may be wrong where nothing like it was ever compiled: these are not.
        """
        job = self.job
        default, *promising = promising_configs(job.spec, job.shape, job.gpu)
        shipped = shipped_seeds(job.place, load_same_capability(job.gpu))
        nearby = nearby_seeds(job.place, self._store.fastest(job.gpu.name, job.spec.family))
        near = neighbours(job.spec, best.config, job.gpu) if best else []
        return [default, *shipped, *nearby, *promising, *near]

    def _known(self) -> list[Result]:
        """What is known of the job's kernels as they are today, compiled as here: the measured first, fast to slow.

        Of each config one: what tells the most, and the newest of that. An old row of it may be of another patch
        release of Triton, or from before fingerprints.
        """
        found: dict[KernelConfig, Result] = {}
        for result in self._results(self.job.place):
            if self._is_current(result):
                old = found.get(result.config)
                found[result.config] = result if old is None or supersedes(result, old) else old
        return sorted(found.values(), key=reading_order)

    def _is_current(self, result: Result) -> bool:
        """Whether it is of the kernel that its config renders today, or of none, and of this process's toolchain."""
        evidence, which = result.evidence, (result.config, result.evidence)
        if which not in self._current:
            same = is_current(result, self.job.gpu)
            # Of a config that has no kernel, or where no ptxas is found. Kernels are rendered for few of the others.
            if not same and evidence.identity == Evidence.here(evidence.kernel, evidence.text).identity:
                same = evidence.identity == self._evidence_of(result.config).identity
            self._current[which] = same
        return self._current[which]

    @property
    def _best_measured(self) -> Result | None:
        return next(iter(fastest(self._known())), None)

    def _guess_us(self, config: KernelConfig) -> float:
        return guess_us(self.job.spec, config, self.job.timed_shape, self.job.gpu)

    def _next_config(self) -> KernelConfig | None:
        """What the search proposes, and of a shared job, nobody else tries or has tried."""
        if self._board is None:
            return self._search.ask()
        self._hear()
        if self._asked + self.progress.elsewhere >= self._trials:
            self._elsewhere.clear()
            return None
        while (config := self._search.ask()) is not None:
            if self._board.claim(config):
                return config
            self._elsewhere.append(config)
        # What others claimed may be free again, if they are gone; until it is known, the job is not done.
        self._elsewhere = [config for config in self._elsewhere if config not in self._heard]
        free = next((config for config in self._elsewhere if self._board.claim(config)), None)
        if free is not None:
            self._elsewhere.remove(free)
        return free

    def _hear(self) -> None:
        """Take in what workers elsewhere found since this was last done."""
        if self._board is None:
            return
        news = self._board.news()
        for result in news:
            self._store.save(result)
            if result.config not in self._heard:
                self._heard.add(result.config)
                self._search.tell(result.config, result.time_us if result.outcome.has_time else None)
        best = self._best_measured if news and self._measure else None
        if best is not None:
            self.progress.best = best
        self.progress.elsewhere = len(self._heard) - self._heard_before

    def _ended_by(self, compiled: TrialResult) -> TrialResult | None:
        """What ends a trial that was compiled: a failure, spills, too much shared memory; None for nothing."""
        resources, most = compiled.resources, self.job.gpu.shared_per_block
        if compiled.outcome.failed or resources is None:
            return compiled
        if resources.spills > MOST_SPILLS:
            return TrialResult(Outcome.RESOURCES, f"spills {resources.spills} bytes a thread, over {MOST_SPILLS}")
        if resources.shared_bytes > most:
            return TrialResult(Outcome.RESOURCES, f"needs {resources.shared_bytes} bytes of shared memory, over {most}")
        return None

    @property
    def _best_us(self) -> float:
        best = self.progress.best
        return best.time_us if best is not None and best.time_us is not None else float("inf")

    def _trial(self, config: KernelConfig) -> Trial:
        return Trial(self.job.spec, config, self.job.shape, self.job.gpu)

    def _source(self, config: KernelConfig) -> KernelSource | None:
        try:
            return render(self.job.spec, config, self.job.gpu)
        except ConfigError:  # the child will say so too, and its answer is recorded
            return None

    def _source_of(self, config: KernelConfig) -> str:
        """What is the same for configs, of any bucket, that render alike."""
        source = self._source(config)
        return f"{self.job.place.digest} {config_to_json(config)}" if source is None else source.sha256

    def _evidence_of(self, config: KernelConfig) -> Evidence:
        """What a result of a config is of; of a config that has no kernel, no kernel."""
        source = self._source(config)
        return Evidence.here("", "") if source is None else evidence_of(source)

    def _note(self, result: Result) -> None:
        """Store a result, tell the search, and keep the best."""
        self._store.save(result)
        if self._board is not None:
            self._board.finish(result)
        self._search.tell(result.config, result.time_us if result.outcome.has_time else None)
        if result.outcome is self._wanted and result.time_us is not None and result.time_us < self._best_us:
            self.progress.best = result
        self.progress.kinds[result.outcome] = self.progress.kinds.get(result.outcome, 0) + 1
        self.progress.seconds = time.monotonic() - self._start

    def _result(
        self, config: KernelConfig, compiled: TrialResult, reply: TrialResult, *, predicted_us: float | None = None
    ) -> Result:
        resources, timing = compiled.resources, reply.timing
        return Result(
            place=self.job.place,
            evidence=self._evidence_of(config),
            config=config,
            outcome=reply.outcome,
            shape=self.job.timed_shape,
            time_us=timing.median_us if timing else predicted_us,
            time_us_p20=timing.p20_us if timing else None,
            time_us_p80=timing.p80_us if timing else None,
            error=reply.error,
            registers=resources.registers if resources else None,
            spills=resources.spills if resources else None,
            shared_bytes=resources.shared_bytes if resources else None,
            compile_s=compiled.seconds,
            detail=truncated_detail(reply.detail),
            source=f"{'measured on' if timing else 'compiled for'} {self.job.gpu.title}",
        )
