"""Chooses the kernel of a call, what the memory ranks first for its place, and says what it rests on. Never tunes."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType

from parallax_gen.codegen.build import compile_here, give_triton_a_cache, load
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
from parallax_gen.problem.spec import FLAGS, OWN_LENGTHS, KernelSpec

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The config that a call gets, and what it rests on.

    checked, refused  as of memory/guard.py
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
        """What it rests on; None where it is the default, for want of one."""
        return self.candidate.record


def choose(
    spec: KernelSpec, shape: Shape, gpu: Gpu, memory: RecordSource, compiled: CompiledResources | None = None
) -> Choice:
    """What a call gets: see memory/ranking.py and memory/guard.py."""
    place = Place(gpu.name, spec, bucket_of(shape))
    found = checked_choice(place, gpu, memory, compiled)
    choice = Choice(place, found.candidate, found.checked, found.refused)
    for refused, why in found.refused:
        _LOG.info("%s; %s: not %s, for %s", spec, place.bucket, describe(refused.config), why)
    record, why = choice.record, choice.candidate.tier.words
    told = why if record is None else f"{why}, {record.time_us} us, {record.created_at}"
    _LOG.info("%s; %s, on %s: %s: %s", spec, place.bucket, gpu.name, told, describe(choice.config))
    return choice


class Dispatcher:
    """Chooses and loads kernels, each once: `memory` is asked on the first call of a bucket only."""

    def __init__(self, memory: RecordSource):
        self._memory = memory
        self._kernels: dict[Place, tuple[Choice, ModuleType]] = {}
        self._adviser = Adviser()

    def use(self, memory: RecordSource) -> None:
        """Ask another memory from now on, for what was chosen before too."""
        self._memory = memory
        self._kernels.clear()

    def kernel(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> tuple[Choice, ModuleType]:
        """What was chosen for a call, and the module to launch.

        Says once when that rests on less than a measurement of it here. Raises UntunedError where that is not allowed:
        see `Adviser`.
        """
        place = Place(gpu.name, spec, bucket_of(shape))
        found = self._kernels.get(place)
        if found is None:
            give_triton_a_cache()
            self._adviser.check(place, gpu, self._memory)
            choice = choose(spec, shape, gpu, self._memory, _compiler(spec, shape, gpu))
            self._adviser.tell(place, choice.candidate)
            found = (choice, load(render(spec, choice.config, gpu)))
            self._kernels[place] = found
            _LOG.info("%s; %s: runs %s", spec, place.bucket, found[1].__file__)
        return found


def _compiler(spec: KernelSpec, shape: Shape, gpu: Gpu) -> CompiledResources | None:
    """Finds out what borrowed kernels of a call need, each once a machine; None where there is no device to ask."""
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

    One that cannot be used stops no training and no serving: it is passed over, with a warning, and from then on only
    what ships counts. So is a file of shipped records.
    """

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(None, folder)
        try:
            self.store = Store(read_only=True)
        except StoreError as error:
            _warn_of(error)

    def close(self) -> None:
        if self.store is not None:
            self.store.close()

    def results(self, place: Place) -> list[Result]:
        try:
            return super().results(place)
        except StoreError as error:  # of a file that ships
            _warn_of(error, "Only your own records and defaults are used.")
            return self.query_store(lambda store: store.results(place))

    def query_store(self, ask: Callable[[Store], list[Result]]) -> list[Result]:
        try:
            return super().query_store(ask)
        except StoreError as error:
            self.store = None
            _warn_of(error)
            return []


def _warn_of(error: StoreError, instead: str = "Only shipped records and defaults are used.") -> None:
    warnings.warn(f"{error} {instead}", stacklevel=level_of_user())


@cache
def default_dispatcher() -> Dispatcher:
    """The process's own."""
    return Dispatcher(RuntimeMemory())


# -- What a call's kernel rests on, where that is less than a measurement of it here, and what would mend that.


class UntunedWarning(UserWarning):
    """A call runs a kernel that was not measured on this GPU with this Triton."""


class Adviser:
    """Says it once, of the first such kernel: one for each dispatcher."""

    def __init__(self) -> None:
        self._told = False

    def check(self, place: Place, gpu: Gpu, known: RecordSource) -> None:
        """Refuse a call of which nothing was measured here, if that is asked for: before anything is compiled for it.

        Raises UntunedError with PARALLAX_GEN_STRICT=1, which allows no other kernels than those measured here, and
        ArgumentError where that or PARALLAX_GEN_QUIET is neither on nor off, whatever is known.
        """
        strict, _ = is_on(STRICT), is_on(QUIET)
        if strict and best(place, gpu, known).tier != Tier.MEASURED_HERE:
            raise UntunedError(f"{STRICT} is on, and {_nothing_counts(place)}. {_mended_by(place)}")

    def tell(self, place: Place, candidate: Candidate) -> None:
        """Tell, by Python's warnings and the log, that a call's kernel was not measured here.

        Silent with PARALLAX_GEN_QUIET=1, and in all processes of torch.distributed but rank 0.
        """
        quiet = is_on(QUIET)
        if candidate.tier == Tier.MEASURED_HERE:
            return
        if self._told or quiet or not _first_rank():
            return
        self._told = True  # before it is told: where warnings are errors, the next call runs
        told = f"{_nothing_counts(place)}: {_instead(candidate)}. {_mended_by(place)}"
        told += f" This is said once a process; {QUIET}=1 silences it."
        _LOG.warning("%s", told)
        warnings.warn(told, UntunedWarning, stacklevel=level_of_user())


def level_of_user() -> int:
    """The stacklevel with which a warning of the function that asks names the user's line.

    That is the innermost one outside this package and torch. Code that torch generates may lie between: it is of a
    module of torch's, or of none. On autograd's threads there may be no such line; then it is the outermost.
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


def _nothing_counts(place: Place) -> str:
    return f"no measurement counts of {place.spec}; {place.bucket} on {place.gpu} with {Toolchain.here()}"


def _instead(candidate: Candidate) -> str:
    record = candidate.record
    if record is None:
        return "its default config is used"
    of = f"{record.place.bucket}" if candidate.tier == Tier.NEIGHBOUR else record.place.gpu
    return f"a record of {of} with {record.evidence.measured_with} is used"


def _mended_by(place: Place) -> str:
    return f"`{tune_command(place)}` makes one."


def _first_rank() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def tune_command(place: Place) -> str:
    """The command that tunes a place on the card that it runs on."""
    spec, shape = place.spec, representative(place.bucket, place.spec.group)
    heads = f"{shape.heads}" if spec.group == 1 else f"{shape.heads}/{shape.kv_heads}"
    one_length = shape.seqlen_q == (1 if spec.family == "decode" else shape.seqlen_kv)
    lengths = f"{shape.seqlen_kv}" if one_length else f"{shape.seqlen_q}x{shape.seqlen_kv}"
    words = ["parallax-gen", "tune", "--op", spec.family]
    words += ["--head-dim", f"{spec.head_dim}", "--dtype", spec.dtype, "--shape", f"{shape.batch},{heads},{lengths}"]
    if spec.window:  # one of all keys would be none; a key less rounds to the same bucket
        words += ["--window", f"{min(shape.window, shape.seqlen_kv - 1)}"]
    elif not spec.causal and (spec.many_queries or (spec.op in FLAGS["causal"] and spec.op not in OWN_LENGTHS)):
        words.append("--full")
    words += [f"--{name}" for name in ("varlen", "stats", "ragged", "leftpad") if spec.flat()[name]]
    words += ["--page-size", f"{spec.page_size}"] if spec.page_size else []
    words += ["--cache-dtype", spec.cache_dtype] if spec.cache_dtype else []
    return " ".join(words)
