"""`parallax_gen.prepare`: compiles the kernels of a model before they are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parallax_gen.api.targets import Kernel, Sizes, check_count, only_one, target_of
from parallax_gen.api.text import text_of
from parallax_gen.codegen import device
from parallax_gen.describe import LEGEND, brief, format_counts, number, seqlen_text
from parallax_gen.errors import UnknownGpuError, tune_extra
from parallax_gen.memory.guard import NOT_BORROWED, launch_candidates
from parallax_gen.memory.lock import Lock
from parallax_gen.memory.place import config_at, place_of
from parallax_gen.memory.ranking import Candidate, RecordSource, Tier, default_of
from parallax_gen.ops.base import KernelConfig, config_to_dict
from parallax_gen.problem.hardware import Gpu, gpu_by_name
from parallax_gen.problem.shapes import Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import RuntimeMemory, choose, default_dispatcher
from parallax_gen.tables import Table
from parallax_gen.tuning.workers.messages import KernelInstance, Reply

if TYPE_CHECKING:
    from parallax_gen.api.targets import AnyModel
    from parallax_gen.runtime.dispatch import DispatchChoice


@dataclass(frozen=True)
class PreparedKernel:
    """A kernel at a shape, and the config that its calls get.

    tier     where the config comes from; its `text` says it in words. The default's for a locked kernel
    checked  False if only a first call can decide: the config is borrowed, and the card is not here
    time_us  of the record that the config comes from, in its bucket; None for the default config
    seconds  how long it took to compile, with the rivals that it was checked against
    problem  why it did not compile; "" if it did
    locked   a lock has the config
    """

    spec: KernelSpec
    shape: Shape
    config: KernelConfig
    tier: Tier
    checked: bool
    time_us: float | None
    seconds: float
    problem: str = ""
    locked: bool = False

    @property
    def source(self) -> str:
        """Where the config comes from, for people."""
        return Candidate(self.tier, self.config, None, self.locked).source

    def to_json(self) -> dict[str, Any]:
        parts = {"spec": self.spec.to_dict(), "shape": self.shape.to_dict(), "config": config_to_dict(self.config)}
        others = ("checked", "time_us", "seconds", "problem")
        return parts | {"tier": self.source} | {name: getattr(self, name) for name in others}


@dataclass(frozen=True, repr=False)
class Prepared:
    """The compiled kernels; its repr is a table.

    title  of what was prepared
    gpu    the card's name in records
    """

    title: str
    gpu: str
    kernels: list[PreparedKernel]

    @property
    def tiers(self) -> Counter[str]:
        """How many kernels have their config from each tier."""
        return Counter(kernel.source for kernel in self.kernels)

    def to_json(self) -> dict[str, Any]:
        return {"gpu": self.gpu, "kernels": [kernel.to_json() for kernel in self.kernels]}

    def __repr__(self) -> str:
        columns = ("kernel", "BxH", "seqlen", "us", "compile s", "config from", "config")
        table = Table("", columns, [_line(kernel) for kernel in self.kernels], columns[1:5])
        notes = [f"configs: {format_counts(self.tiers)}"]
        if not all(kernel.checked for kernel in self.kernels):
            notes.append("*: not checked yet: a first call compiles it, and may take the default instead")
        notes += [f"{k.spec}; {k.shape} did not compile: {k.problem}" for k in self.kernels if k.problem]
        return text_of(f"{self.title}; on {self.gpu}", [table], [*notes, LEGEND])


@tune_extra("parallax_gen.prepare")
def prepare(
    model: AnyModel | None = None,
    *,
    kernels: Kernel | Iterable[Kernel] | None = None,
    training: Sizes = None,
    serving: Sizes = None,
    tp: int = 1,
    dtype: str | None = None,
    gpu: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Prepared:
    """Compile all kernels of a model, or given ones, in parallel, so that no call of theirs has to.

    model, kernels, training, serving, tp, dtype, workers, progress  as in `parallax_gen.tune`
    gpu  by default the card in this machine; or the name of another, to fill the caches of an image for it

    Returns the config of each kernel, and the tier that it comes from. The programs are in Triton's cache, for calls
    with these sizes and contiguous tensors; calls with others compile theirs at first, if Triton specialises them
    otherwise. Borrowed configs are checked, as a first call would. Nothing is measured, and nothing is launched.

    Raises ArgumentError, UnknownGpuError, MachineError if the machine is at fault or lacks the extra `tune`,
    UntunedError if PARALLAX_GEN_STRICT is on and a kernel was not measured here, and LockError if a lock refuses a
    kernel, before any is compiled. A kernel that does not compile is only noted.
    """
    from parallax_gen.tuning.compile_ahead import compile_ahead
    from parallax_gen.tuning.progress import CompileProgress, progress_console

    only_one(model=model, kernels=kernels)
    check_count("workers", workers)
    target = target_of(model, kernels, training=training, serving=serving, tp=tp, dtype=dtype)
    here = device.gpu_here(None)
    if gpu is None and here is None:
        raise UnknownGpuError("there is no CUDA device here: name a GPU, such as gpu='h200'")
    card = here if here is not None and gpu in (None, here.name) else gpu_by_name(str(gpu))
    is_here = here is not None and here.name == card.name
    with ExitStack() as stack:
        memory = default_dispatcher().memory if is_here else stack.enter_context(closing(RuntimeMemory()))
        lock = default_dispatcher().lock
        instances = {kernel: _instances(*kernel, card, memory, lock) for kernel in target.kernels}
        to_compile = [instance for group in instances.values() for instance in group]
        with CompileProgress(progress_console(quiet=not progress), len(to_compile)) as view:
            replies = dict(zip(to_compile, compile_ahead(to_compile, workers, view.advance), strict=True))
        prepared = []
        for (spec, shape), group in instances.items():
            # On this card the choice is the dispatcher's, which loads the kernel and checks a borrowed one.
            choice = (
                default_dispatcher().kernel(spec, shape, card)[0]
                if is_here
                else choose(spec, shape, card, memory, lock=lock)
            )
            prepared.append(_prepared(spec, shape, choice, {i.config: replies[i] for i in group}))
    return Prepared(target.title, card.name, prepared)


def _instances(
    spec: KernelSpec, shape: Shape, card: Gpu, memory: RecordSource, lock: Lock | None
) -> list[KernelInstance]:
    """The kernels that a call may get: the locked one, the best, or borrowed ones and the default for their check."""
    place = place_of(card.name, spec, shape)
    if lock is not None:
        return [KernelInstance(spec, config_at(spec, lock.candidate(place, card).config), shape, card)]
    configs = [candidate.config for candidate in launch_candidates(place, card, memory)]
    best = next(launch_candidates(place, card, memory))
    if best.tier not in NOT_BORROWED:
        configs.append(default_of(place, card))
    return [KernelInstance(spec, config_at(spec, config), shape, card) for config in dict.fromkeys(configs)]


def _prepared(
    spec: KernelSpec, shape: Shape, choice: DispatchChoice, replies: dict[KernelConfig, Reply]
) -> PreparedKernel:
    reply, record = replies.get(choice.config), choice.record
    return PreparedKernel(
        spec,
        shape,
        choice.config,
        choice.candidate.tier,
        choice.checked,
        None if record is None else record.time_us,
        sum(reply.seconds for reply in replies.values()),
        reply.detail if reply is not None and reply.outcome.failed else "",
        choice.candidate.locked,
    )


def _line(kernel: PreparedKernel) -> tuple[str, ...]:
    bucket = bucket_of(kernel.shape)
    source = kernel.source if kernel.checked else f"{kernel.source}*"
    seconds = "failed" if kernel.problem else f"{kernel.seconds:.1f}"
    sizes = str(bucket.kv_rows), seqlen_text(kernel.shape), "-" if kernel.time_us is None else number(kernel.time_us)
    return kernel.spec.public_op, *sizes, seconds, source, brief(kernel.config)
