"""The loop that joins search, workers and store: propose, compile in parallel, check and time, write down."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from parallax_gen.codegen.render import templates_hash
from parallax_gen.memory.keys import Key
from parallax_gen.memory.results import Result, now
from parallax_gen.memory.shipped import load_shipped
from parallax_gen.memory.store import Store
from parallax_gen.problem.config import KernelConfig
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.heuristics import promising_configs
from parallax_gen.problem.shapes import Bucket, Shape, representative
from parallax_gen.problem.space import neighbours
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.model import bound_by_matmuls, predict_us
from parallax_gen.tuning.search import Search
from parallax_gen.tuning.worker import Compile, Measure, Outcome, Trial, Worker

COMPILE_TIMEOUT_S = 120.0  # the slowest kernels take about ten seconds; a worker's start is in it
MEASURE_TIMEOUT_S = 120.0  # the oracle of the largest shapes is in it
MOST_SPILLS = 512  # bytes of stack a thread; in the sweeps kernels that spill half as much are far from the best
GIVE_UP = 1.5  # a call this many times slower than the best has lost
FINALISTS, FINALIST_MS = 8, 80.0  # at most so many are timed again, for longer: a short timing is off by 1 or 2 %


@dataclass(frozen=True)
class Job:
    """What to tune: one spec in one bucket on one GPU."""

    spec: KernelSpec
    bucket: Bucket
    gpu: Gpu

    @property
    def key(self) -> Key:
        return Key.here(self.gpu.name, self.spec, self.bucket, templates_hash(self.spec))

    @property
    def shape(self) -> Shape:
        """The sizes it is tuned at."""
        return representative(self.bucket, self.spec.group)


def proven_configs(job: Job, folder: Path | None = None) -> list[KernelConfig]:
    """What was fastest for the job's spec on GPUs of the same capability, of the records that ship.

    All that are known of its bucket, then the best of each other one. Of any template and Triton: to begin with, not
    to believe.
    """
    alike = [gpu.name for gpu in GPUS.values() if gpu.capability == job.gpu.capability]
    records = [r for name in alike for r in load_shipped(name, folder) if r.key.spec == job.spec]
    here = [r.config for r in records if r.key.bucket == job.bucket]
    best = {r.key.bucket: r.config for r in reversed(records)}  # a file has each key's fastest first
    return list(dict.fromkeys([*here, *best.values()]))


@dataclass
class Progress:
    """How a job stands. `kinds` counts this run's outcomes; `known` those that earlier runs left."""

    job: Job
    known: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    best: Result | None = None
    seconds: float = 0.0

    @property
    def done(self) -> int:
        return sum(self.kinds.values())


class Tuner:
    """Tunes jobs on one GPU. A context: it owns the child processes, and leaving it ends them.

    measure=False compiles and predicts only, and needs no GPU. compilers: how many processes compile, by default
    one a core but for one, which is left to the process that measures.
    """

    def __init__(self, store: Store, *, measure: bool, compilers: int | None = None):
        self._store = store
        self._measure = measure
        self._compilers = _Compilers(compilers or max(1, (os.cpu_count() or 2) - 1))
        self._bench = Worker(with_device=True)
        if measure:
            self._bench.start()

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, *_: object) -> None:
        self._compilers.close()
        self._bench.close()

    def tune(self, job: Job, *, trials: int, time_budget_s: float, on_progress: Callable[[Progress], None]) -> Progress:
        """Try configs until there were `trials` of them, or the seconds are spent, or none is left.

        Every outcome is stored as it comes: an interrupt loses nothing, and the next run goes on from there.
        on_progress is called after each, and twice a second while none is ready.
        """
        run = _Run(job, self._store, self._measure, deadline=time.monotonic() + time_budget_s)
        asked = waiting = 0
        while not run.spent:
            # Twice the compilers: the next ones are ready while this thread times.
            while waiting < 2 * self._compilers.width and asked < trials:
                config = run.search.ask()
                if config is None:
                    break
                self._compilers.submit(Compile(run.trial(config)))
                asked, waiting = asked + 1, waiting + 1
            if not waiting:
                break
            compiled = self._compilers.next(timeout_s=0.5)
            if compiled is not None and not run.spent:
                waiting -= 1
                run.note(self._judge(run, *compiled))
            on_progress(run.progress)  # also while nothing is ready: a caller may want to stop
        self._compilers.drop_waiting()
        if self._measure:
            self._time_finalists_again(run)
        on_progress(run.progress)
        return run.progress

    def _judge(self, run: _Run, config: KernelConfig, compiled: Outcome) -> Result:
        """What comes of a config that was compiled: pruned, measured, or predicted."""
        if compiled.kind != "ok" or compiled.resources is None:
            return run.result(config, compiled, compiled)
        if compiled.resources.spills > MOST_SPILLS:
            detail = f"spills {compiled.resources.spills} bytes a thread, over {MOST_SPILLS}"
            return run.result(config, compiled, Outcome("resources", detail))
        job = run.progress.job
        if compiled.resources.shared_bytes > job.gpu.shared_per_block:
            detail = f"needs {compiled.resources.shared_bytes} bytes of shared memory, over {job.gpu.shared_per_block}"
            return run.result(config, compiled, Outcome("resources", detail))
        if not self._measure:
            estimate = predict_us(job.spec, config, job.shape, job.gpu, compiled.resources)
            return run.result(config, compiled, Outcome("predicted"), predicted_us=estimate)
        give_up_us = GIVE_UP * run.best_us
        outcome = self._bench.ask(Measure(run.trial(config), give_up_us), MEASURE_TIMEOUT_S)
        return run.result(config, compiled, outcome)

    def _time_finalists_again(self, run: _Run) -> None:
        """Time the best once more until the best is one that was: a lucky short timing does not win."""
        again: set[KernelConfig] = set()
        while len(again) < FINALISTS:
            best = self._store.best(run.key)
            if best is None or best.config in again:
                break
            from_rest = bound_by_matmuls(best.key.spec.op)
            request = Measure(run.trial(best.config), timed_ms=FINALIST_MS, from_rest=from_rest)
            self._store.record(run.result_again(best, self._bench.ask(request, MEASURE_TIMEOUT_S)))
            again.add(best.config)
        run.progress.best = self._store.best(run.key)


class _Run:
    """One job being tuned: what is known, what to try next, how it stands."""

    def __init__(self, job: Job, store: Store, measure: bool, deadline: float):
        self.key = job.key
        self._store = store
        self._wanted = "ok" if measure else "predicted"
        self._start, self._deadline = time.monotonic(), deadline
        known = [r for r in store.results(self.key) if not (measure and r.outcome == "predicted")]
        best = next((r for r in known if r.outcome == self._wanted), None)
        default, *promising = promising_configs(job.spec, job.shape, job.gpu)
        proven = proven_configs(job)
        around = best.config if best else default
        near = neighbours(job.spec, around, job.gpu)
        self.search = Search(job.spec, job.gpu, first=[default, *proven, *promising, *near])
        for result in known:
            self.search.tell(result.config, result.time_us)
        self.progress = Progress(job, known=len(known), best=best)

    @property
    def spent(self) -> bool:
        return time.monotonic() >= self._deadline

    @property
    def best_us(self) -> float:
        best = self.progress.best
        return best.time_us if best is not None and best.time_us is not None else float("inf")

    def trial(self, config: KernelConfig) -> Trial:
        return Trial(self.progress.job.spec, config, self.progress.job.shape, self.progress.job.gpu)

    def note(self, result: Result) -> None:
        """Store a result, tell the search, and keep the best."""
        self._store.record(result)
        succeeded = result.outcome in ("ok", "slow", "predicted")
        self.search.tell(result.config, result.time_us if succeeded else None)
        if result.outcome == self._wanted and result.time_us is not None and result.time_us < self.best_us:
            self.progress.best = result
        self.progress.kinds[result.outcome] = self.progress.kinds.get(result.outcome, 0) + 1
        self.progress.seconds = time.monotonic() - self._start

    def result(
        self, config: KernelConfig, compiled: Outcome, outcome: Outcome, *, predicted_us: float | None = None
    ) -> Result:
        resources, timing = compiled.resources, outcome.timing
        return Result(
            key=self.key,
            config=config,
            outcome=outcome.kind,
            shape=self.progress.job.shape,
            time_us=timing.median_us if timing else predicted_us,
            time_us_p20=timing.p20_us if timing else None,
            time_us_p80=timing.p80_us if timing else None,
            error=outcome.error,
            registers=resources.registers if resources else None,
            spills=resources.spills if resources else None,
            shared_bytes=resources.shared_bytes if resources else None,
            compile_s=compiled.seconds,
            detail=outcome.detail,
            source=f"{'measured on' if timing else 'compiled for'} {self.progress.job.gpu.title}",
        )

    def result_again(self, before: Result, outcome: Outcome) -> Result:
        """A result measured once more: the newer times, the same resources."""
        timing = outcome.timing
        return replace(
            before,
            outcome=outcome.kind,
            time_us=timing.median_us if timing else None,
            time_us_p20=timing.p20_us if timing else None,
            time_us_p80=timing.p80_us if timing else None,
            error=outcome.error,
            detail=outcome.detail,
            created_at=now(),
        )


class _Compilers:
    """Worker processes that compile, each asked by a thread of its own; what comes of it waits in a queue."""

    def __init__(self, width: int):
        self.width = width
        self._requests: SimpleQueue[tuple[int, Compile] | None] = SimpleQueue()
        self._outcomes: SimpleQueue[tuple[int, KernelConfig, Outcome]] = SimpleQueue()
        self._job = 0  # outcomes of earlier jobs are dropped
        self._workers = [Worker(with_device=False) for _ in range(width)]
        self._threads = [Thread(target=self._serve, args=(worker,), daemon=True) for worker in self._workers]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Compile) -> None:
        self._requests.put((self._job, request))

    def next(self, timeout_s: float) -> tuple[KernelConfig, Outcome] | None:
        """A config and what came of compiling it; None if nothing is ready in time."""
        try:
            job, config, outcome = self._outcomes.get(timeout=timeout_s)
        except Empty:
            return None
        return (config, outcome) if job == self._job else None

    def drop_waiting(self) -> None:
        """Forget what was submitted: a job's time is spent."""
        self._job += 1
        with contextlib.suppress(Empty):
            while True:
                self._requests.get_nowait()

    def close(self) -> None:
        self.drop_waiting()
        for _ in self._threads:
            self._requests.put(None)
        for worker in self._workers:
            worker.kill()  # a thread that waits for it gets a crash, then the None
        for thread in self._threads:
            thread.join()

    def _serve(self, worker: Worker) -> None:
        while (item := self._requests.get()) is not None:
            job, request = item
            self._outcomes.put((job, request.trial.config, worker.ask(request, COMPILE_TIMEOUT_S)))
        worker.close()
