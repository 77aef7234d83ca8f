"""Chooses the kernel for a call: what a lock has for its place, or else the config that memory/ranking.py ranks first.

Tunes nothing itself.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType

from parallax_gen.codegen.build import compile_here, ensure_triton_cache, load
from parallax_gen.codegen.render import render
from parallax_gen.codegen.resources import Resources
from parallax_gen.describe import describe
from parallax_gen.environment import QUIET, STRICT, is_on
from parallax_gen.errors import BuildError, StoreError, UntunedError
from parallax_gen.memory.commands import how_to_measure, lock_command
from parallax_gen.memory.guard import CompiledResources, cache_resources, cached_resources, checked_choice
from parallax_gen.memory.lock import NO_CHECK, Lock, lock_of_environment
from parallax_gen.memory.place import Place, config_at, place_of
from parallax_gen.memory.ranking import MOST_LOSS, Candidate, RecordSource, Tier, best
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain, UntestedTritonWarning, newer_than_tested
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape, representative
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.ranks import check_same_lock, is_first_rank

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class DispatchChoice:
    """The config that a call uses, and the record of its place that it comes from.

    checked, refused  see memory/guard.py
    """

    spec: KernelSpec
    place: Place
    candidate: Candidate
    checked: bool = True
    refused: tuple[tuple[Candidate, str], ...] = ()

    @property
    def config(self) -> KernelConfig:
        return config_at(self.spec, self.candidate.config)

    @property
    def record(self) -> Result | None:
        """The record that the config comes from; None for the default config."""
        return self.candidate.record


def choose(
    spec: KernelSpec,
    shape: Shape,
    gpu: Gpu,
    memory: RecordSource,
    compiled: CompiledResources | None = None,
    lock: Lock | None = None,
) -> DispatchChoice:
    """The config that a call uses: see memory/ranking.py and memory/guard.py; with a lock memory/lock.py.

    Raises LockError if the lock refuses the call.
    """
    place = place_of(gpu.name, spec, shape)
    checked = checked_choice(place, gpu, memory, compiled, lock)
    choice = DispatchChoice(spec, place, checked.candidate, checked.checked, checked.refused)
    for refused, reason in checked.refused:
        _LOG.info("%s; %s: %s is not used: %s", spec, place.bucket, describe(refused.config), reason)
    record, message = choice.record, choice.candidate.source
    if record is not None:
        message += f", {record.time_us} us, {record.created_at}"
    if choice.candidate.locked and lock is not None:
        message += f" {lock.path}, {NO_CHECK}"
    _LOG.info("%s; %s, on %s: %s: %s", spec, place.bucket, gpu.name, message, describe(choice.config))
    return choice


class Dispatcher:
    """Chooses and loads kernels, each once: it reads `memory` only on the first call of a bucket.

    on_first_call  called before that: returns whether it may have stored records. None, unless somebody sets it
    """

    def __init__(self, memory: RecordSource, lock: Lock | None = None):
        self.on_first_call: Callable[[KernelSpec, Shape, Gpu], bool] | None = None
        self._memory, self._lock = memory, lock
        self._lock_of_ranks = ""  # what was last compared with the other ranks: see `check_same_lock`
        self._choices: dict[tuple[Place, bool], DispatchChoice] = {}
        self._kernels: dict[tuple[Place, KernelSpec], tuple[DispatchChoice, ModuleType]] = {}
        self._untuned_notice, self._unlocked_notice = UntunedNotice(), UnlockedNotice()
        self._untested_triton_notice = UntestedTritonNotice()

    def use(self, memory: RecordSource) -> None:
        """Choose from another memory from now on, also for kernels that were chosen before."""
        self._memory = memory
        self._forget()

    def use_lock(self, lock: Lock | None) -> None:
        """Take kernels from a lock from now on, or none, also kernels that were chosen before."""
        self._lock = lock
        self._forget()

    def _forget(self) -> None:
        self._choices.clear()
        self._kernels.clear()

    @property
    def lock(self) -> Lock | None:
        return self._lock

    @property
    def memory(self) -> RecordSource:
        return self._memory

    def choose_anew(self) -> None:
        """Choose from what is stored now, also for kernels that were chosen before. A shared table stays as it is."""
        self.use(_read_again(self._memory))

    def kernel(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> tuple[DispatchChoice, ModuleType]:
        """The choice for a call, and the module to launch.

        With a lock, its kernel: nothing is tuned at first calls, and records do not count. Raises LockError if the lock
        refuses the call. Raises DistributedError, also without a lock, if another rank is known to hold another one.

        Otherwise warns once if the kernel was not measured on this GPU with this toolchain, or raises UntunedError in
        strict mode: see `UntunedNotice`.
        """
        place = place_of(gpu.name, spec, shape)
        chosen = self._kernels.get((place, spec))
        if chosen is None:
            ensure_triton_cache()
            self._untested_triton_notice.warn()
            key = place, spec.batch_invariant  # kernels of several specs share a batch-invariant choice
            choice = self._choices.get(key) or self._choose(place, spec, shape, gpu)
            choice = replace(choice, spec=spec)
            chosen = (choice, load(render(spec, choice.config, gpu)))
            self._choices[key], self._kernels[place, spec] = choice, chosen
            _LOG.info("%s; %s: runs %s", spec, place.bucket, chosen[1].__file__)
        return chosen

    def _choose(self, place: Place, spec: KernelSpec, shape: Shape, gpu: Gpu) -> DispatchChoice:
        lock = self._lock
        self._lock_of_ranks = check_same_lock(lock, self._lock_of_ranks)
        if lock is not None:
            choice = choose(spec, shape, gpu, self._memory, lock=lock)
            if not choice.candidate.locked:
                self._unlocked_notice.warn(place, lock)
            return choice
        if self.on_first_call is not None and self.on_first_call(spec, shape, gpu):
            self._memory = _read_again(self._memory)
        self._untuned_notice.check(place, gpu, self._memory)
        choice = choose(spec, shape, gpu, self._memory, compiler(spec, shape, gpu))
        self._untuned_notice.warn(place, gpu, choice.candidate)
        return choice


def compiler(spec: KernelSpec, shape: Shape, gpu: Gpu) -> CompiledResources | None:
    """A function that compiles borrowed kernels and returns their resources, cached; None without a CUDA device.

    For batch-invariant calls it compiles the kernel of their place, so that all of them get the same answer.
    """
    import torch
    import triton

    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return None
    if spec.batch_invariant:
        place = place_of(gpu.name, spec, shape)
        spec, shape = place.spec, representative(place.bucket, place.spec.group)

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
    """The dispatcher of this process, with the lock that PARALLAX_GEN_LOCK names."""
    lock = lock_of_environment()  # raises if it cannot be read: nothing may run without it
    return Dispatcher(RuntimeMemory(), lock)


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
            raise UntunedError(f"{STRICT} is on, and {_no_measurement(place)}. {how_to_measure(place, gpu)}")

    def warn(self, place: Place, gpu: Gpu, candidate: Candidate) -> None:
        """Warn and log that a call's kernel was not measured here.

        Silent if PARALLAX_GEN_QUIET=1, and on all ranks of torch.distributed except rank 0.
        """
        quiet = is_on(QUIET)
        if candidate.tier == Tier.MEASURED_HERE:
            return
        if self._warned or quiet or not is_first_rank():
            return
        self._warned = True  # set first: where warnings are errors, the next call runs
        message = f"{_no_measurement(place)}: {_what_runs(candidate)}. {how_to_measure(place, gpu)}"
        message += f" This warning appears once per process; {QUIET}=1 silences it."
        _LOG.warning("%s", message)
        warnings.warn(message, UntunedWarning, stacklevel=user_stacklevel())


class UnlockedWarning(UserWarning):
    """A call runs a default config because the lock does not have its kernel."""


class UnlockedNotice:
    """Warns once per dispatcher, for the first kernel that is not in the lock."""

    def __init__(self) -> None:
        self._warned = False

    def warn(self, place: Place, lock: Lock) -> None:
        """Warn and log that a call runs its default. Silent as `UntunedNotice.warn`."""
        if self._warned or is_on(QUIET) or not is_first_rank():
            return
        self._warned = True
        message = f"{lock.lacks(place)}: its default config is used. Run `{lock_command(place, lock.path)}` to lock it."
        message += f" This warning appears once per process; {QUIET}=1 silences it."
        _LOG.warning("%s", message)
        warnings.warn(message, UnlockedWarning, stacklevel=user_stacklevel())


class UntestedTritonNotice:
    """Warns once per dispatcher if Triton is newer than was tested."""

    def __init__(self) -> None:
        self._warned = False

    def warn(self) -> None:
        """Warn and log that Triton is newer than was tested. Silent as `UntunedNotice.warn`."""
        message = newer_than_tested()
        if not message or self._warned or is_on(QUIET) or not is_first_rank():
            return
        self._warned = True
        message += f" This warning appears once per process; {QUIET}=1 silences it."
        _LOG.warning("%s", message)
        warnings.warn(message, UntestedTritonWarning, stacklevel=user_stacklevel())


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
    where = f"{record.place.gpu} with {record.evidence.measured_with}"
    if candidate.supports_default:
        loss = f"at most {MOST_LOSS - 1:.0%} slower than the fastest config"
        return f"its default config is used, which was {loss} at {record.place.bucket} on {where}"
    return f"a record of {where} is used"
