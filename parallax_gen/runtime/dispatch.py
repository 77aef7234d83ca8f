"""Chooses the kernel for a call: the config that memory/ranking.py ranks first for its place. Tunes nothing itself."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType

from parallax_gen.codegen.build import compile_here, ensure_triton_cache, load
from parallax_gen.codegen.render import render
from parallax_gen.codegen.resources import Resources
from parallax_gen.describe import describe
from parallax_gen.environment import QUIET, STRICT, is_on
from parallax_gen.errors import BuildError, StoreError, UntunedError
from parallax_gen.memory.guard import CompiledResources, cache_resources, cached_resources, checked_choice
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Candidate, RecordSource, Tier, best
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape, bucket_of, representative
from parallax_gen.problem.spec import FLAGS, PER_SEQUENCE_LENGTH_OPS, KernelSpec

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class DispatchChoice:
    """The config that a call at a place uses, and the record that it comes from.

    checked, refused  see memory/guard.py
    """

    place: Place
    candidate: Candidate
    checked: bool = True
    refused: tuple[tuple[Candidate, str], ...] = ()

    @property
    def config(self) -> KernelConfig:
        return self.candidate.config

    @property
    def record(self) -> Result | None:
        """The record that the config comes from; None for the default config."""
        return self.candidate.record


def choose(
    spec: KernelSpec, shape: Shape, gpu: Gpu, memory: RecordSource, compiled: CompiledResources | None = None
) -> DispatchChoice:
    """The config that a call uses: see memory/ranking.py and memory/guard.py."""
    place = Place(gpu.name, spec, bucket_of(shape))
    checked = checked_choice(place, gpu, memory, compiled)
    choice = DispatchChoice(place, checked.candidate, checked.checked, checked.refused)
    for refused, reason in checked.refused:
        _LOG.info("%s; %s: %s is not used: %s", spec, place.bucket, describe(refused.config), reason)
    record, message = choice.record, choice.candidate.tier.text
    if record is not None:
        message += f", {record.time_us} us, {record.created_at}"
    _LOG.info("%s; %s, on %s: %s: %s", spec, place.bucket, gpu.name, message, describe(choice.config))
    return choice


class Dispatcher:
    """Chooses and loads kernels, each once: it reads `memory` only on the first call of a bucket.

    on_first_call  called before that: returns whether it may have stored records. None, unless somebody sets it
    """

    def __init__(self, memory: RecordSource):
        self.on_first_call: Callable[[KernelSpec, Shape, Gpu], bool] | None = None
        self._memory = memory
        self._kernels: dict[Place, tuple[DispatchChoice, ModuleType]] = {}
        self._untuned_notice = UntunedNotice()

    def use(self, memory: RecordSource) -> None:
        """Choose from another memory from now on, also for kernels that were chosen before."""
        self._memory = memory
        self._kernels.clear()

    @property
    def memory(self) -> RecordSource:
        return self._memory

    def choose_anew(self) -> None:
        """Choose from what is stored now, also for kernels that were chosen before. A shared table stays as it is."""
        self.use(_read_again(self._memory))

    def kernel(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> tuple[DispatchChoice, ModuleType]:
        """The choice for a call, and the module to launch.

        Warns once if the kernel was not measured on this GPU with this toolchain, or raises UntunedError in strict
        mode: see `UntunedNotice`.
        """
        place = Place(gpu.name, spec, bucket_of(shape))
        chosen = self._kernels.get(place)
        if chosen is None:
            ensure_triton_cache()
            if self.on_first_call is not None and self.on_first_call(spec, shape, gpu):
                self._memory = _read_again(self._memory)
            self._untuned_notice.check(place, gpu, self._memory)
            choice = choose(spec, shape, gpu, self._memory, _compiler(spec, shape, gpu))
            self._untuned_notice.warn(place, choice.candidate)
            chosen = (choice, load(render(spec, choice.config, gpu)))
            self._kernels[place] = chosen
            _LOG.info("%s; %s: runs %s", spec, place.bucket, chosen[1].__file__)
        return chosen


def _compiler(spec: KernelSpec, shape: Shape, gpu: Gpu) -> CompiledResources | None:
    """A function that compiles borrowed kernels and returns their resources, cached; None without a CUDA device."""
    import torch
    import triton

    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return None

    def compiled(config: KernelConfig) -> Resources | None:
        source = render(spec, config, gpu)
        resources = cached_resources(source, gpu)
        if resources is None:
            try:
                resources = compile_here(source, spec, config, shape)
            except BuildError as error:
                cache_resources(source, gpu, error)
                raise
            cache_resources(source, gpu, resources)
        return resources

    return compiled


class RuntimeMemory(Memory):
    """The user's database over the shipped records.

    An unusable database must not stop training or serving: it is skipped with a warning, and from then on only shipped
    records count. An unusable file of shipped records is also skipped with a warning.
    """

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(None, folder)
        try:
            self.store = Store(read_only=True)
        except StoreError as error:
            _warn_about(error)

    def close(self) -> None:
        if self.store is not None:
            self.store.close()

    def results(self, place: Place) -> list[Result]:
        try:
            return super().results(place)
        except StoreError as error:  # in a file of shipped records
            _warn_about(error, "Only your own records and defaults are used.")
            return self.query_store(lambda store: store.results(place))

    def query_store(self, query: Callable[[Store], list[Result]]) -> list[Result]:
        try:
            return super().query_store(query)
        except StoreError as error:
            self.store = None
            _warn_about(error)
            return []


def _read_again(memory: RecordSource) -> RecordSource:
    """The database as it is now, even if there was none before; any other memory stays the same."""
    return RuntimeMemory() if isinstance(memory, RuntimeMemory) else memory


def _warn_about(error: StoreError, instead: str = "Only shipped records and defaults are used.") -> None:
    warnings.warn(f"{error} {instead}", stacklevel=user_stacklevel())


@cache
def default_dispatcher() -> Dispatcher:
    """The dispatcher of this process."""
    return Dispatcher(RuntimeMemory())


# -- The notice for a kernel that was not measured here, with the command that would measure it.


class UntunedWarning(UserWarning):
    """A call runs a kernel that was not measured on this GPU with this Triton."""


class UntunedNotice:
    """Warns once per dispatcher, for the first kernel that was not measured here."""

    def __init__(self) -> None:
        self._warned = False

    def check(self, place: Place, gpu: Gpu, memory: RecordSource) -> None:
        """In strict mode refuse a call whose kernel was not measured here, before anything is compiled for it.

        Raises UntunedError if PARALLAX_GEN_STRICT=1, which allows only kernels measured here, and ArgumentError if
        PARALLAX_GEN_STRICT or PARALLAX_GEN_QUIET has an invalid value.
        """
        strict, _ = is_on(STRICT), is_on(QUIET)
        if strict and best(place, gpu, memory).tier != Tier.MEASURED_HERE:
            raise UntunedError(f"{STRICT} is on, and {_no_measurement(place)}. {_command_to_measure(place)}")

    def warn(self, place: Place, candidate: Candidate) -> None:
        """Warn and log that a call's kernel was not measured here.

        Silent if PARALLAX_GEN_QUIET=1, and on all ranks of torch.distributed except rank 0.
        """
        quiet = is_on(QUIET)
        if candidate.tier == Tier.MEASURED_HERE:
            return
        if self._warned or quiet or not _is_first_rank():
            return
        self._warned = True  # set first: where warnings are errors, the next call runs
        message = f"{_no_measurement(place)}: {_what_runs(candidate)}. {_command_to_measure(place)}"
        message += f" This warning appears once per process; {QUIET}=1 silences it."
        _LOG.warning("%s", message)
        warnings.warn(message, UntunedWarning, stacklevel=user_stacklevel())


def user_stacklevel() -> int:
    """The stacklevel with which a warning raised in the calling function names the user's line.

    The user's line is in the innermost frame outside this package and torch. Frames of code that torch generates have
    a torch module or none. On autograd's threads there may be no such frame; then the warning names the outermost.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 0
    while frame is not None:
        level += 1
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in ("", "parallax_gen", "torch"):
            break
        frame = frame.f_back
    return level


def _no_measurement(place: Place) -> str:
    return f"there is no usable measurement of {place.spec}; {place.bucket} on {place.gpu} with {Toolchain.here()}"


def _what_runs(candidate: Candidate) -> str:
    record = candidate.record
    if record is None:
        return "its default config is used"
    measured_for = f"{record.place.bucket}" if candidate.tier == Tier.NEAR_BUCKET else record.place.gpu
    return f"a record of {measured_for} with {record.evidence.measured_with} is used"


def _command_to_measure(place: Place) -> str:
    return f"Run `{tune_command(place)}` to measure it."


def _is_first_rank() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def tune_command(place: Place) -> str:
    """The `parallax-gen tune` command that tunes a place, on the card it is run on."""
    spec, shape = place.spec, representative(place.bucket, place.spec.group)
    heads = f"{shape.heads}" if spec.group == 1 else f"{shape.heads}/{shape.kv_heads}"
    one_length = shape.seqlen_q == (1 if spec.public_op == "decode" else shape.seqlen_kv)
    lengths = f"{shape.seqlen_kv}" if one_length else f"{shape.seqlen_q}x{shape.seqlen_kv}"
    command = ["parallax-gen", "tune", "--op", spec.public_op]
    command += ["--head-dim", f"{spec.head_dim}", "--dtype", spec.dtype, "--shape", f"{shape.batch},{heads},{lengths}"]
    if spec.window:  # a window over all keys would count as none; one key less rounds to the same bucket
        command += ["--window", f"{min(shape.window, shape.seqlen_kv - 1)}"]
    elif not spec.causal and (
        spec.multi_token or (spec.op in FLAGS["causal"] and spec.op not in PER_SEQUENCE_LENGTH_OPS)
    ):
        command.append("--full")
    command += [f"--{name}" for name in ("varlen", "stats", "ragged", "leftpad", "softcap") if spec.flat()[name]]
    command += ["--page-size", f"{spec.page_size}"] if spec.page_size else []
    command += ["--cache-dtype", spec.cache_dtype] if spec.cache_dtype else []
    return " ".join(command)
