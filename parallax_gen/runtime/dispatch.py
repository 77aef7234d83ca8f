"""Chooses the kernel of a call: what the memory ranks first for its place. Never tunes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from parallax_gen.codegen.build import compile_here, load
from parallax_gen.codegen.render import render
from parallax_gen.codegen.resources import Resources
from parallax_gen.describe import describe
from parallax_gen.errors import BuildError, StoreError
from parallax_gen.files import give_triton_a_cache
from parallax_gen.memory.guard import Compiled, guarded, keep, kept
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Candidate, Known
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.advice import Adviser, level_of_user

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


def choose(spec: KernelSpec, shape: Shape, gpu: Gpu, memory: Known, compiled: Compiled | None = None) -> Choice:
    """What a call gets: see memory/ranking.py and memory/guard.py."""
    place = Place(gpu.name, spec, bucket_of(shape))
    found = guarded(place, gpu, memory, compiled)
    choice = Choice(place, found.candidate, found.checked, found.refused)
    for refused, why in found.refused:
        _LOG.info("%s; %s: not %s, for %s", spec, place.bucket, describe(refused.config), why)
    record, why = choice.record, choice.candidate.tier.words
    told = why if record is None else f"{why}, {record.time_us} us, {record.created_at}"
    _LOG.info("%s; %s, on %s: %s: %s", spec, place.bucket, gpu.name, told, describe(choice.config))
    return choice


class Dispatcher:
    """Chooses and loads kernels, each once: `memory` is asked on the first call of a bucket only."""

    def __init__(self, memory: Known):
        self._memory = memory
        self._kernels: dict[Place, tuple[Choice, ModuleType]] = {}
        self._adviser = Adviser()

    def use(self, memory: Known) -> None:
        """Ask another memory from now on, for what was chosen before too."""
        self._memory = memory
        self._kernels.clear()

    def kernel(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> tuple[Choice, ModuleType]:
        """What was chosen for a call, and the module to launch.

        Says once when that rests on less than a measurement of it here. Raises UntunedError where that is not allowed:
        see runtime/advice.py.
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


def _compiler(spec: KernelSpec, shape: Shape, gpu: Gpu) -> Compiled | None:
    """Finds out what borrowed kernels of a call need, each once a machine; None where there is no device to ask."""
    import torch
    import triton

    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return None

    def compiled(config: KernelConfig) -> Resources | None:
        source = render(spec, config, gpu)
        resources = kept(source, gpu)
        if resources is None:
            try:
                resources = compile_here(source, spec, config, shape)
            except BuildError as error:
                keep(source, gpu, error)
                raise
            keep(source, gpu, resources)
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
            return self.own(lambda store: store.results(place))

    def own(self, ask: Callable[[Store], list[Result]]) -> list[Result]:
        try:
            return super().own(ask)
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
