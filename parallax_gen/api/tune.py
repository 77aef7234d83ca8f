"""`parallax_gen.tune`: finds the best kernels for a model from Python, and stores them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallax_gen.api.targets import (
    Kernel,
    Sizes,
    Target,
    check_count,
    check_seconds,
    only_one,
    refuse_options_of_models,
    target_of,
)
from parallax_gen.api.text import text_of
from parallax_gen.codegen.device import gpu_here
from parallax_gen.describe import LEGEND
from parallax_gen.errors import CONTEXT_BYTES, ArgumentError, UnknownGpuError, tune_extra
from parallax_gen.memory.calls import read_calls
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import GPUS, STAND_IN, Gpu, gpu_by_name
from parallax_gen.tuning.calls import plan_of_calls
from parallax_gen.tuning.devices import free_devices
from parallax_gen.tuning.interrupt import Interrupt
from parallax_gen.tuning.job import Progress
from parallax_gen.tuning.plan import CallTimes, Plan, StepTimes, plan_of, times_after_tune
from parallax_gen.tuning.summary import times_tables

if TYPE_CHECKING:
    import os
    from collections import Counter

    from parallax_gen.api.targets import AnyModel
    from parallax_gen.memory.calls import Kernel as CalledKernel
    from parallax_gen.runtime.recording import Recording
    from parallax_gen.tuning.tuner import Tuner
    from parallax_gen.tuning.workers.worker import Worker


@dataclass(frozen=True, repr=False)
class Tuned:
    """What a tune found; its repr is a table.

    title     of what was tuned
    gpu       the card's name in records
    measured  False if there was no card: times are predicted, and calls do not use these configs
    database  where the results are stored
    steps     for each step its kernels' best configs, their times and their defaults'
    """

    title: str
    gpu: str
    measured: bool
    database: Path
    steps: list[StepTimes]

    @property
    def kernels(self) -> list[CallTimes]:
        """The kernels of all steps: `call.spec`, `call.shape`, `config`, `time_us`, `default_us` and `gain` of each."""
        return [kernel for step in self.steps for kernel in step.lines]

    def to_json(self) -> dict[str, Any]:
        steps = [step.to_json() for step in self.steps]
        return {"gpu": self.gpu, "measured": self.measured, "database": str(self.database), "steps": steps}

    def __repr__(self) -> str:
        name = "best us" if self.measured else "predicted us"
        notes = [] if self.measured else ["nothing was measured: these times are predicted, and calls do not use them"]
        return text_of(f"{self.title}; on {self.gpu}", times_tables(self.steps, name), [*notes, LEGEND])


@tune_extra("parallax_gen.tune")
def tune(
    model: AnyModel | None = None,
    *,
    kernels: Kernel | Iterable[Kernel] | None = None,
    calls: str | os.PathLike[str] | Recording | None = None,
    training: Sizes = None,
    serving: Sizes = None,
    tp: int = 1,
    dtype: str | None = None,
    gpu: str | None = None,
    devices: Sequence[int] | None = None,
    trials: int = 64,
    time_budget_s: float = 45.0,
    workers: int | None = None,
    progress: bool = True,
) -> Tuned:
    """Find the best kernels for a model, for given kernels or for recorded calls, and store them: `parallax-gen tune`.

    model          a folder of transformers or its config.json; or an nn.Module with layers of
                   `parallax_gen.nn.ParallaxAttention`, or converted by `parallax_gen.integrations.transformers.convert`
                   (batch-invariant if its layers are; layers of None, and models of transformers, as
                   `parallax_gen.batch_invariant` says)
    kernels        instead of a model: (`parallax_gen.KernelSpec`, `parallax_gen.Shape`), or several
    calls          instead of a model: a file of `PARALLAX_GEN_RECORD`, or what `parallax_gen.record` returned. The
                   costliest kernels come first, and those that take less than 1 % of the time are left out
    training       with a model: False for no training steps; or a dict of their sizes, of batch and seqlen
    serving        with a model: False for no steps of a serving engine; or a dict of their sizes, of max_len,
                   page_size, max_batch, chunk and cache_dtype. By default it serves, unless its layers are not causal
    tp             with a model: tensor parallel ranks, each of which has so many times fewer heads
    dtype          with a model: of q, r, k and v, "bf16", "fp16", "fp32" or "tf32"; by default that of its weights.
                   With autocast, give autocast's
    gpu            by default the card in this machine; without one, the name of a card to predict for, or an H200
    devices        GPUs to measure on, by index, all of one card; by default all that no other process uses, of the
                   current one's card if this process uses CUDA. With several GPUs the progress begins with a line on
                   which
    trials         configs per kernel and bucket of sizes
    time_budget_s  seconds for each
    workers        compiling processes; by default one per usable CPU
    progress       show it on standard error or in the notebook

    Child processes compile and measure. The GPU should be idle meanwhile, with room for the largest kernel's inputs.
    Every finished trial is stored: an interrupt loses none, and the same call continues from there. Later calls of this
    process choose their kernels anew; captured CUDA graphs keep theirs, and ranks that called `share_tuning` keep its
    table until they call it again. Of several ranks only one should tune.

    Raises ArgumentError, UnknownGpuError for a card that is not here, StoreError for a database or a file of calls that
    cannot be used, and MachineError if the machine is at fault or lacks the extra `tune`.
    """
    from parallax_gen.tuning.tuner import Tuner, children

    devices = None if devices is None else tuple(devices)
    _check(trials, time_budget_s, devices, workers)
    only_one(model=model, kernels=kernels, calls=calls)
    target: Target | Counter[CalledKernel]
    if calls is not None:
        refuse_options_of_models(training=training, serving=serving, tp=tp, dtype=dtype)
        target = recorded_calls(calls)
    else:
        target = target_of(model, kernels, training=training, serving=serving, tp=tp, dtype=dtype)
    all_free = partial(free_devices, name=gpu or _current_card(), say=_say(progress), own_bytes=_own_bytes)
    with children(devices or all_free, workers) as (measuring, compilers), Store() as store:
        card, measure = card_of(gpu, measuring)
        memory = Memory(store)
        plan = (
            plan_of(target.title, target.steps, card, memory)
            if isinstance(target, Target)
            else plan_of_calls(target, card, memory)
        )
        with Tuner(store, measure=measure, measuring=measuring, compilers=compilers) as tuner:
            done = _tune_all(tuner, plan, trials, time_budget_s, len(measuring), progress)
        times = times_after_tune(plan, done, memory)
        database = store.path
    _choose_anew()
    return Tuned(str(plan.model), card.name, measure, database, times)


def recorded_calls(calls: str | os.PathLike[str] | Recording) -> Counter[CalledKernel]:
    """The counts of a recording or of its file. Raises ArgumentError for anything else, StoreError for another file."""
    counts = getattr(calls, "calls", None)
    if isinstance(counts, Mapping):
        return calls.calls  # type: ignore[union-attr]
    try:
        path = Path(calls).expanduser()  # type: ignore[arg-type]
    except TypeError:
        raise ArgumentError("calls", f"{calls!r:.80}", "a file's path, or what parallax_gen.record returned") from None
    return read_calls(path)


def card_of(name: str | None, measuring: Mapping[int, Worker]) -> tuple[Gpu, bool]:
    """The GPU to tune for, and whether it is present and can measure.

    Raises UnknownGpuError for an unknown name, and unless all devices are of that card, or of one.
    """
    cards = {device: worker.identify() for device, worker in measuring.items()}
    first = next(iter(cards.values()))
    if first is None and tuple(cards) == (0,):  # no device was requested
        return GPUS[STAND_IN] if name is None else gpu_by_name(name), False
    for device, card in cards.items():
        if card is None:
            raise UnknownGpuError(f"devices: there is no CUDA device {device} here")
        if name not in (None, card.name) and gpu_by_name(str(name)).name != card.name:
            raise UnknownGpuError(f"gpu is {name}, but device {device} is {card.name} ({card.title})")
        if first is not None and card.name != first.name:
            raise UnknownGpuError(f"devices: {device} is {card.name}, but the first one is {first.name}")
    assert first is not None
    return first, True


def _check(trials: int, time_budget_s: float, devices: tuple[int, ...] | None, workers: int | None) -> None:
    """Raises ArgumentError, before any child is started."""
    check_count("trials", trials)
    check_count("workers", workers)
    check_seconds("time_budget_s", time_budget_s)
    if devices is None:
        return
    indices = all(type(device) is int and device >= 0 for device in devices)
    if not devices or not indices or len(set(devices)) < len(devices):
        raise ArgumentError("devices", f"{devices!r:.80}", "one or more different indices, from 0 on")


def _uses_cuda() -> bool:
    """Whether this process uses CUDA. If not, it must not begin to: the children do."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _current_card() -> str | None:
    """The name of the card that this process's calls run on, if it uses CUDA."""
    card = gpu_here() if _uses_cuda() else None
    return None if card is None else card.name


def _own_bytes(device: int) -> int:
    """The memory of a device that this process takes: a model that waits for its kernels disturbs no measurement."""
    if not _uses_cuda():
        return 0
    import torch

    reserved = torch.cuda.memory_reserved(device)
    return reserved + CONTEXT_BYTES if reserved or device == torch.cuda.current_device() else 0


def _say(progress: bool) -> Callable[[str], None]:
    from parallax_gen.tuning.progress import progress_console

    return partial(progress_console(quiet=not progress).print, soft_wrap=True)


def _tune_all(
    tuner: Tuner, plan: Plan, trials: int, time_budget_s: float, devices: int, progress: bool
) -> list[Progress]:
    from parallax_gen.tuning.progress import ProgressView, progress_console

    interrupt = Interrupt()
    view = ProgressView(
        progress_console(quiet=not progress),
        len(plan.jobs),
        trials,
        time_budget_s,
        after_update=interrupt.check,
        devices=devices,
    )
    with ExitStack() as stack:
        stack.enter_context(view)
        if threading.current_thread() is threading.main_thread():  # others get no signals
            stack.enter_context(interrupt)
        return tuner.tune_all(plan.jobs, trials=trials, time_budget_s=time_budget_s, watcher=view)


def _choose_anew() -> None:
    """Make later calls of this process choose from the new records. A process without calls loads no kernels here."""
    if "parallax_gen.runtime.plan" in sys.modules:
        from parallax_gen.runtime.dispatch import default_dispatcher
        from parallax_gen.runtime.plan import PlanCache

        default_dispatcher().choose_anew()
        PlanCache.clear_all()
