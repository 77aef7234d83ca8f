"""Chooses the kernel of a call: a record of its bucket, else the heuristics' default. Never tunes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from types import ModuleType

from parallax_gen.codegen.build import give_triton_a_cache, load
from parallax_gen.codegen.device import gpu_of_device
from parallax_gen.codegen.render import render, templates_hash
from parallax_gen.errors import StoreError
from parallax_gen.memory.keys import Environment, Key
from parallax_gen.memory.results import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.memory.table import Known
from parallax_gen.problem.config import KernelConfig, describe
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.heuristics import default_config
from parallax_gen.problem.shapes import Shape, bucket_of, representative
from parallax_gen.problem.space import why_invalid
from parallax_gen.problem.spec import KernelSpec

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The config that a call gets. record is what it rests on; None where it is the default, for want of one."""

    key: Key
    config: KernelConfig
    record: Result | None


def choose(spec: KernelSpec, shape: Shape, gpu: Gpu, memory: Known) -> Choice:
    """The best config measured under the call's key, else the default of its bucket.

    A record of another bucket, GPU or environment is not used: `Memory.near_misses` finds those.
    """
    bucket = bucket_of(shape)
    key = Key.here(gpu.name, spec, bucket, templates_hash(spec))
    record = memory.best(key)
    if record is not None and why_invalid(spec, record.config, gpu) is None:
        choice, why = Choice(key, record.config, record), f"a record, {record.time_us} us, {record.created_at}"
    else:
        choice = Choice(key, default_config(spec, representative(bucket, spec.group), gpu), None)
        why = "the default, for want of a valid record"
    _LOG.info("%s; %s, on %s: %s: %s", spec, bucket, gpu.name, why, describe(choice.config))
    return choice


class Dispatcher:
    """Chooses and loads kernels, each once: `memory` is asked on the first call of a bucket only."""

    def __init__(self, memory: Known):
        self._memory = memory
        self._kernels: dict[Key, tuple[Choice, ModuleType]] = {}

    def use(self, memory: Known) -> None:
        """Ask another memory from now on, for what was chosen before too."""
        self._memory = memory
        self._kernels.clear()

    def kernel(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> tuple[Choice, ModuleType]:
        """What was chosen for a call, and the module to launch."""
        key = Key.here(gpu.name, spec, bucket_of(shape), templates_hash(spec))
        found = self._kernels.get(key)
        if found is None:
            give_triton_a_cache()
            choice = choose(spec, shape, gpu, self._memory)
            found = (choice, load(render(spec, choice.config, gpu)))
            self._kernels[key] = found
            _LOG.info("%s; %s: runs %s", spec, key.bucket, found[1].__file__)
        return found


class RuntimeMemory(Memory):
    """The user's database over the shipped records.

    One that cannot be used stops no training and no serving: it is passed over, with a warning, and from then on only
    what ships counts.
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

    def own(self, ask: Callable[[Store], list[Result]]) -> list[Result]:
        try:
            return super().own(ask)
        except StoreError as error:
            self.store = None
            _warn_of(error)
            return []


def _warn_of(error: StoreError) -> None:
    warnings.warn(f"{error} Only shipped records and defaults are used.", stacklevel=3)


@cache
def default_dispatcher() -> Dispatcher:
    """The process's own."""
    return Dispatcher(RuntimeMemory())


def records_here(memory: Memory, gpu: str) -> list[Result]:
    """The record of each key of a GPU that counts in this process's environment: what choices can rest on."""
    counts = (
        record
        for record in memory.all(gpu)  # sorted: of each key the fastest comes first
        if record.measured and record.key.environment == Environment.here(templates_hash(record.key.spec))
    )
    return [next(records) for _, records in groupby(counts, key=lambda record: record.key)]


def gpu_here() -> Gpu | None:
    """The GPU that the current CUDA device is; None where there is none."""
    import torch

    return gpu_of_device(torch.cuda.current_device()) if torch.cuda.is_available() else None
