"""`parallax_gen.tune_first_calls`: tunes a kernel when it is called for the first time, within a budget."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from parallax_gen.api.targets import check_count, check_seconds
from parallax_gen.errors import CONTEXT_BYTES, ConfigError, MachineError, MeasureError, StoreError, gist, tune_extra
from parallax_gen.memory.lines import read_lines, to_line
from parallax_gen.memory.place import Place, place_of
from parallax_gen.memory.ranking import Tier, best
from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Bucket, Shape, bucket_of
from parallax_gen.problem.spec import QUERY_ROW_OPS, KernelSpec
from parallax_gen.problem.work import work_of
from parallax_gen.problem.workloads import STEP
from parallax_gen.runtime.dispatch import Dispatcher, RuntimeMemory, default_dispatcher, user_stacklevel
from parallax_gen.tuning.job import Job

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store as RankStore

    from parallax_gen.tuning.job import Progress

_LOG = logging.getLogger(__name__)

# The memory that a job's child takes, in times of the least traffic of its kernel: inputs, outputs and their copies in
# the oracle's fp64.
MEMORY_FACTOR = 16
POLL_S = 0.1  # between looks for the records of rank 0
PREFIX = "parallax_gen/first_call/"  # of keys in the store of torch.distributed


class FirstCalls:
    """Tunes at first calls until `stop`, as a context to its end. `tune_first_calls` creates it.

    left_s  how much of the budget is left
    tuned   the kernels and buckets that were tuned so far
    """

    def __init__(self, dispatcher: Dispatcher, budget_s: float, time_budget_s: float, trials: int, progress: bool):
        self._dispatcher = dispatcher
        self._time_budget_s, self._trials, self._progress = time_budget_s, trials, progress
        self.left_s = budget_s
        self.tuned: list[Place] = []
        self._before = dispatcher.on_first_call
        dispatcher.on_first_call = self._on_first_call

    def stop(self) -> None:
        """Tune no more."""
        if self._dispatcher.on_first_call == self._on_first_call:
            self._dispatcher.on_first_call = self._before

    def __enter__(self) -> FirstCalls:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<{len(self.tuned)} kernels and buckets tuned, {self.left_s:.0f} s left>"

    def _on_first_call(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> bool:
        """Tune the kernels of a first call. Returns whether there may be new records."""
        memory = self._dispatcher.memory
        if not isinstance(memory, RuntimeMemory):  # a table that all ranks share
            return False
        begun = time.monotonic()
        try:
            jobs = [Job.of(*kernel, gpu) for kernel in kernels_with(spec, shape)]
            untuned = [job for job in jobs if best(job.place, gpu, memory).tier != Tier.MEASURED_HERE]
            ranks = _ranks()
            if ranks is None:
                return bool(untuned) and self._tune(untuned)
            rank, store = ranks
            key = PREFIX + place_of(gpu.name, spec, shape).digest
            if rank == 0:
                return self._tune_for_all(jobs, untuned, lambda text: store.set(key, text))
            return bool(untuned) and self._wait_for_records(jobs, store, key)
        except ConfigError as error:  # no config of a kernel fits the card, which only a call of that kernel must say
            _LOG.info("%s: is not tuned: %s", spec, error)
            return False
        except (MachineError, MeasureError, StoreError) as error:  # no reason to stop training or serving
            self.stop()
            warnings.warn(f"first calls are not tuned any more: {error}", stacklevel=user_stacklevel())
            return False
        finally:
            self.left_s -= time.monotonic() - begun

    def _tune(self, jobs: Sequence[Job]) -> bool:
        from parallax_gen.tuning.progress import ProgressView, progress_console
        from parallax_gen.tuning.tuner import Tuner, children

        reason = self._why_not_now() or _why_no_memory(jobs)
        if reason:
            _LOG.info("%s; %s: is not tuned: %s", jobs[0].spec, jobs[0].bucket, reason)
            return False
        device = torch.cuda.current_device()
        torch.cuda.synchronize(device)  # kernels of this process would disturb what is measured
        seconds = min(self._time_budget_s, self.left_s / len(jobs))
        view = ProgressView(progress_console(quiet=not self._progress), len(jobs), self._trials, seconds)
        with children((device,), None) as (measuring, compilers), Store() as store:
            card = measuring[device].identify()
            if card is None or card.name != jobs[0].gpu.name:
                raise MeasureError(f"a child process does not find this {jobs[0].gpu.title}")
            with view, Tuner(store, measure=True, measuring=measuring, compilers=compilers) as tuner:
                done = tuner.tune_all(jobs, trials=self._trials, time_budget_s=seconds, watcher=view)
        self.tuned += [progress.job.place for progress in done if _was_measured(progress)]
        return True

    def _why_not_now(self) -> str:
        """Why nothing can be tuned at this moment; "" if it can."""
        if self.left_s <= 0:
            return "the budget is spent"
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured"
        if torch.compiler.is_compiling():
            return "torch.compile traces this call"
        return "this is a backward" if torch._C._current_graph_task_id() != -1 else ""

    # -- Several ranks: rank 0 tunes, and the others wait for its records. There is no collective, so ranks whose calls
    # differ cannot hang: a rank waits no longer than its budget lasts.

    def _tune_for_all(self, jobs: Sequence[Job], untuned: Sequence[Job], publish: Callable[[str], Any]) -> bool:
        text = "\n"  # also if nothing could be tuned, so that nobody waits
        try:
            tuned = bool(untuned) and self._tune(untuned)
            with Store(read_only=True) as store:
                text += "".join(to_line(r) for job in jobs for r in store.results(job.place) if r.informative)
            return tuned
        finally:
            publish(text)

    def _wait_for_records(self, jobs: Sequence[Job], store: RankStore, key: str) -> bool:
        if self._why_not_now():
            return False
        end = time.monotonic() + self.left_s
        try:
            # Not `store.wait`, during which no other thread can use the store.
            while not store.check([key]):
                if time.monotonic() > end:
                    return False
                time.sleep(POLL_S)
            text = store.get(key)
        except RuntimeError as error:
            raise MachineError(f"the store of torch.distributed cannot be read: {gist(error)}") from error
        parsed = read_lines("the records of rank 0", text.splitlines())
        if parsed.problems:
            raise StoreError(parsed.problems[0])
        places = {job.place for job in jobs}
        with Store() as own:
            own.merge(result for result in parsed.results if result.place in places)
        return True


@tune_extra("parallax_gen.tune_first_calls")
def tune_first_calls(
    budget_s: float = 300.0, *, time_budget_s: float = 20.0, trials: int = 64, progress: bool = True
) -> FirstCalls:
    """Tune each kernel and bucket of sizes when it is called for the first time, until the budget is spent.

        with parallax_gen.tune_first_calls(budget_s=120):
            train_step()

    As a function it tunes until `stop` is called on the result. A call of a kernel that was measured on this card with
    this Triton does not tune. The first forward that is followed by a backward also tunes the backward's kernels.

    budget_s       seconds in all, with the start of child processes. Then calls get what is known
    time_budget_s  seconds for a kernel and bucket, at most
    trials         configs for each, at most
    progress       show it on standard error or in the notebook

    The call waits meanwhile. Nothing is tuned during the capture of a CUDA graph, while torch.compile traces, in a
    backward, or if the card's free memory is short: such a call gets what is known, and so do later ones of its bucket.
    In a job of several ranks rank 0 tunes, and the others wait for its records at their first call, but not longer than
    their budget lasts; after `share_tuning` nothing is tuned. A fault of the machine ends it with a warning.
    Raises ArgumentError, and MachineError if the extra `tune` is not installed.
    """
    import parallax_gen.tuning.progress
    import parallax_gen.tuning.tuner  # noqa: F401  -- what the first call takes, imported now: an error must come here

    check_count("trials", trials)
    for name, value in (("budget_s", budget_s), ("time_budget_s", time_budget_s)):
        check_seconds(name, value)
    return FirstCalls(default_dispatcher(), budget_s, time_budget_s, trials, progress)


def kernels_with(spec: KernelSpec, shape: Shape) -> list[tuple[KernelSpec, Bucket]]:
    """A call's kernel and bucket. With a forward that returns statistics also those of the backward that follows.

    A backward tunes nothing: autograd's threads run it, and some of its memory is already allocated.
    """
    if not (spec.op == "forward" and spec.stats):
        return [(spec, bucket_of(shape))]
    rows = replace(shape, kv_heads=shape.heads, seqlen_kv=shape.seqlen_q, window=0)
    specs = [spec.for_op(op) for op in STEP]
    return [(step, bucket_of(rows if step.op in QUERY_ROW_OPS else shape)) for step in specs]


def _why_no_memory(jobs: Sequence[Job]) -> str:
    """Why the card's free memory does not allow to tune jobs; "" if it does."""
    needed = max(memory_of(job) for job in jobs)
    free, _ = torch.cuda.mem_get_info()
    if free >= needed:
        return ""
    return f"it takes {needed / 2**30:.1f} GiB of the card's memory, of which {free / 2**30:.1f} GiB are free"


def memory_of(job: Job) -> float:
    """An upper estimate of the card's memory that a job's child takes."""
    unwindowed = replace(job.shape, window=0)  # a window makes no tensor smaller
    return MEMORY_FACTOR * work_of(job.spec, unwindowed).bytes + CONTEXT_BYTES


def _was_measured(progress: Progress) -> bool:
    return progress.best is not None and progress.best.measured


def _ranks() -> tuple[int, RankStore] | None:
    """This process's rank, and the store of all ranks; None if there is one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.get_rank(), dist.distributed_c10d._get_default_store()
