"""One job while it is tuned: its known results, the next config to try, the outcomes, and when it is over."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from parallax_gen.codegen.render import KernelSource, render
from parallax_gen.errors import ConfigError
from parallax_gen.memory.bounds import truncated_detail
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import default_of, evidence_of, fastest, is_current
from parallax_gen.memory.result import Evidence, Outcome, Result, reading_order, supersedes
from parallax_gen.memory.shipped import load_same_capability
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import KernelConfig, config_to_json
from parallax_gen.ops.space import neighbours, promising_configs
from parallax_gen.tuning.claims import SharedClaims
from parallax_gen.tuning.finals import Finals
from parallax_gen.tuning.job import Job, Progress
from parallax_gen.tuning.search.cost_model import guess_us, predict_us
from parallax_gen.tuning.search.search import Search
from parallax_gen.tuning.seeds import nearby_seeds, shipped_seeds
from parallax_gen.tuning.workers.messages import Compile, KernelInstance, Measure, Reply, WorkerRequest

MAX_SPILLS = 512  # bytes per thread; in the recorded sweeps kernels that spill half as much are far from the best
GIVE_UP_FACTOR = 1.5  # timing stops early for a call this many times slower than the best


class JobRun:
    """The trials of a job, from the first config to the last finalist.

    The scheduler takes configs to compile (`next_compile`), passes on the replies (`on_compiled`), takes requests for a
    device (`next_request`), and passes on those replies (`on_measured`), until the run is `over`. Every result is
    stored at once. With measure=False the time of a compiled config is predicted, and nothing is measured.

    With `claims`, other tuners share the job: one tuner tries each config, all tuners get its result, the trials
    of all tuners count, and the tuner that ends last times the finalists again.

    With `only_configs`, only these configs are tried, even if they have results.
    """

    def __init__(
        self,
        job: Job,
        store: Store,
        *,
        measure: bool,
        trials: int,
        claims: SharedClaims | None = None,
        only_configs: Sequence[KernelConfig] | None = None,
        results: Callable[[Place], list[Result]] | None = None,
    ):
        """results: looks up the results of a place; by default in the store. New results always go to the store."""
        self.job = job
        self._results = results or store.results
        self._store, self._measure, self._max_trials, self._claims = store, measure, trials, claims
        self._best_outcome = Outcome.OK if measure else Outcome.PREDICTED
        self._known_current: dict[tuple[KernelConfig, Evidence], bool] = {}  # see `_is_current`
        self._default = default_of(job.place, job.gpu)
        known_results = [
            r for r in self._current_results() if not (r.is_machine_fault or (measure and not r.outcome.tried))
        ]
        if only_configs is not None:
            known_results = []
        best = next((r for r in known_results if r.outcome is self._best_outcome), None)
        seeds = self._seeds(best) if only_configs is None else only_configs
        self._search = Search(job.spec, job.gpu, seeds, guess=self._guess_us, among=only_configs)
        for result in known_results:
            self._search.tell(result.config, result.time_us)
        self.progress = Progress(job, known=len(known_results), best=best)
        # How many configs were proposed, how many are being compiled, and how many requests are being served.
        self._proposed = self._compiling = self._measuring = 0
        self._ready: deque[tuple[KernelConfig, Reply]] = deque()  # compiled, and not yet measured
        self._on_device: dict[KernelConfig, Reply] = {}  # compiled, and now being measured
        self._finals = Finals(job.spec.op, self._current_results, self._instance, self._default, only_configs or ())
        self._claimed_elsewhere: list[KernelConfig] = []  # other tuners had claimed these when they were proposed
        self._shared_configs: set[KernelConfig] = set()  # configs that other tuners finished
        self._shared_at_start = 0
        self._take_shared_results()
        self._shared_at_start, self.progress.other_tuners = len(self._shared_configs), 0
        self._some_compiled, self._seconds = False, float("inf")
        self._start = time.monotonic()

    def begin(self, seconds: float) -> None:
        """Start the time budget, because a device is free: now, or once the first config is compiled."""
        self._start, self._seconds = time.monotonic(), seconds
        if self._some_compiled:
            self.progress.deadline = self._start + seconds

    @property
    def in_flight(self) -> int:
        """How many configs were proposed and are not finished."""
        return self._compiling + len(self._ready) + len(self._on_device)

    @property
    def searching(self) -> bool:
        """Whether trials are running or still to come."""
        return time.monotonic() < self.progress.deadline and (self._proposed < self._max_trials or self.in_flight > 0)

    @property
    def over(self) -> bool:
        """Whether nothing is left to do. Compilations that are still running are ignored."""
        return not self.searching and not self._measuring and (self._finals.over or not self._measure)

    def heartbeat(self) -> None:
        """Send the heartbeat to other tuners. To be called every second or so."""
        if self._claims is not None:
            self._claims.heartbeat()

    def close(self) -> None:
        """Withdraw unfinished claims, and take in the results of other tuners."""
        if self._claims is not None:
            self._claims.release()
            self._take_shared_results()

    def next_compile(self) -> tuple[str, Compile] | None:
        """The key of the next config's source and the request to compile it; None if no trial or config is left."""
        config = self._next_config() if self._proposed < self._max_trials else None
        if config is None:
            if not self._claimed_elsewhere:
                self._max_trials = self._proposed
            return None
        self._proposed += 1
        self._compiling += 1
        return self._source_key(config), Compile(self._instance(config))

    def on_compiled(self, config: KernelConfig, reply: Reply) -> bool:
        """Take the reply of a compilation. Returns True if it ended the trial: failed, pruned or predicted."""
        self._compiling -= 1
        if not self._some_compiled:  # the time budget begins here: it excludes the seconds in which compilers start
            self._some_compiled = True
            self.progress.deadline = time.monotonic() + self._seconds
        ended = self._early_end(reply)
        if ended is None and self._measure:
            self._ready.append((config, reply))
            return False
        estimate = None
        if ended is None:
            assert reply.resources is not None
            ended = Reply(Outcome.PREDICTED)
            estimate = predict_us(self.job.spec, config, self.job.timed_shape, self.job.gpu, reply.resources)
        self._store_result(self._result(config, reply, ended, predicted_us=estimate))
        return True

    def next_request(self) -> WorkerRequest | None:
        """The request for a free device; None if there is none now, or none any more."""
        request: WorkerRequest | None = None
        if self.searching:
            if self._ready:
                config, self._on_device[config] = self._ready.popleft()
                # The default is always timed to the end: its time shows what tuning gained.
                give_up_us = float("inf") if config == self._default else GIVE_UP_FACTOR * self._best_us
                request = Measure(self._instance(config), give_up_us)
        elif self._measure and not self._measuring:
            self._finals.over |= self._claims is not None and self._claims.others_have_claims()
            request = self._finals.next_request()
        self._measuring += request is not None
        return request

    def on_measured(self, request: WorkerRequest, reply: Reply) -> bool:
        """Take the reply to a request. Returns True if it ended a trial, False for finals."""
        self._measuring -= 1
        if isinstance(request, Measure) and request.instance.config in self._on_device:
            config = request.instance.config
            self._store_result(self._result(config, self._on_device.pop(config), reply))
            return True
        for result in self._finals.results_of(request, reply):
            result = replace(result, evidence=self._evidence_of(result.config))  # an old record may have other evidence
            self._store.save(result)
            if self._claims is not None:
                self._claims.publish(result)
        self.progress.best = self._best_measured
        return False

    def _seeds(self, best: Result | None) -> list[KernelConfig]:
        """The configs to try before the search proposes any: the default, fast ones elsewhere, the best's neighbours.

        The search starts from a cost model, which may be wrong for kernels unlike those that it was fitted to.
        """
        job = self.job
        default, *promising = promising_configs(job.spec, job.shape, job.gpu)
        shipped = shipped_seeds(job.place, load_same_capability(job.gpu))
        nearby = nearby_seeds(job.place, self._store.fastest(job.gpu.name, job.spec.public_op))
        best_neighbours = neighbours(job.spec, best.config, job.gpu) if best else []
        return [default, *shipped, *nearby, *promising, *best_neighbours]

    def _current_results(self) -> list[Result]:
        """The results of the job's current kernels with this toolchain, the measured ones first, from fast to slow.

        One result per config, by `supersedes`. An older record may be from another patch release of Triton, or from
        before fingerprints.
        """
        current: dict[KernelConfig, Result] = {}
        for result in self._results(self.job.place):
            if self._is_current(result):
                old = current.get(result.config)
                current[result.config] = result if old is None or supersedes(result, old) else old
        return sorted(current.values(), key=reading_order)

    def _is_current(self, result: Result) -> bool:
        """Whether a result has this process's toolchain, and the kernel that its config renders today, if any."""
        evidence, key = result.evidence, (result.config, result.evidence)
        if key not in self._known_current:
            is_current_result = is_current(result, self.job.gpu)
            # Also current: a config without a kernel, or any result if no ptxas was found. This renders few other
            # configs.
            if not is_current_result and evidence.identity == Evidence.here(evidence.kernel, evidence.text).identity:
                is_current_result = evidence.identity == self._evidence_of(result.config).identity
            self._known_current[key] = is_current_result
        return self._known_current[key]

    @property
    def _best_measured(self) -> Result | None:
        return next(iter(fastest(self._current_results())), None)

    def _guess_us(self, config: KernelConfig) -> float:
        return guess_us(self.job.spec, config, self.job.timed_shape, self.job.gpu)

    def _next_config(self) -> KernelConfig | None:
        """The search's next config; in a shared job, one that no other tuner claims or has tried."""
        if self._claims is None:
            return self._search.ask()
        self._take_shared_results()
        if self._proposed + self.progress.other_tuners >= self._max_trials:
            self._claimed_elsewhere.clear()
            return None
        while (config := self._search.ask()) is not None:
            if self._claims.claim(config):
                return config
            self._claimed_elsewhere.append(config)
        # Claims of dead tuners expire, so the job is not done until the results of all claims are known.
        self._claimed_elsewhere = [config for config in self._claimed_elsewhere if config not in self._shared_configs]
        free = next((config for config in self._claimed_elsewhere if self._claims.claim(config)), None)
        if free is not None:
            self._claimed_elsewhere.remove(free)
        return free

    def _take_shared_results(self) -> None:
        """Take in the results that other tuners finished since the last call."""
        if self._claims is None:
            return
        new_results = self._claims.new_results()
        for result in new_results:
            self._store.save_trial(result)
            if result.config not in self._shared_configs:
                self._shared_configs.add(result.config)
                self._search.tell(result.config, result.time_us if result.outcome.has_time else None)
        best = self._best_measured if new_results and self._measure else None
        if best is not None:
            self.progress.best = best
        self.progress.other_tuners = len(self._shared_configs) - self._shared_at_start

    def _early_end(self, compiled: Reply) -> Reply | None:
        """The outcome that ends a trial after compiling: a failure, spills, too much shared memory.

        None to continue.
        """
        resources, max_shared = compiled.resources, self.job.gpu.shared_per_block
        if compiled.outcome.failed or resources is None:
            return compiled
        if resources.spills > MAX_SPILLS:
            return Reply(Outcome.RESOURCES, f"spills {resources.spills} bytes a thread, over {MAX_SPILLS}")
        if resources.shared_bytes > max_shared:
            return Reply(Outcome.RESOURCES, f"needs {resources.shared_bytes} bytes of shared memory, over {max_shared}")
        return None

    @property
    def _best_us(self) -> float:
        best = self.progress.best
        return best.time_us if best is not None and best.time_us is not None else float("inf")

    def _instance(self, config: KernelConfig) -> KernelInstance:
        return KernelInstance(self.job.spec, config, self.job.shape, self.job.gpu)

    def _source(self, config: KernelConfig) -> KernelSource | None:
        try:
            return render(self.job.spec, config, self.job.gpu)
        except ConfigError:  # the child raises it too, and its reply is stored
            return None

    def _source_key(self, config: KernelConfig) -> str:
        """A key of a config's source: equal for configs, also of other buckets, that render the same source."""
        source = self._source(config)
        return f"{self.job.place.digest} {config_to_json(config)}" if source is None else source.sha256

    def _evidence_of(self, config: KernelConfig) -> Evidence:
        """The evidence for a config's result. Its kernel is empty if the config renders none."""
        source = self._source(config)
        return Evidence.here("", "") if source is None else evidence_of(source)

    def _store_result(self, result: Result) -> None:
        """Store a result, pass its time to the search, and update the progress."""
        self._store.save_trial(result)
        if self._claims is not None:
            self._claims.finish(result)
        self._search.tell(result.config, result.time_us if result.outcome.has_time else None)
        if result.outcome is self._best_outcome and result.time_us is not None and result.time_us < self._best_us:
            self.progress.best = result
        self.progress.outcomes[result.outcome] = self.progress.outcomes.get(result.outcome, 0) + 1
        self.progress.seconds = time.monotonic() - self._start

    def _result(
        self, config: KernelConfig, compiled: Reply, reply: Reply, *, predicted_us: float | None = None
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
