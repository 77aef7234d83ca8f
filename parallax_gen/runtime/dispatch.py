"""Chooses the kernel of a call: a record of its bucket, else the heuristics' default. Never tunes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import render, templates_hash
from parallax_gen.errors import StoreError
from parallax_gen.memory.keys import Key
from parallax_gen.memory.results import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.problem.config import KernelConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.heuristics import default_config
from parallax_gen.problem.shapes import Shape, bucket_of, representative
from parallax_gen.problem.space import why_invalid
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class Choice:
    """The config that a call gets. record is what it rests on; None where it is the default, for want of one."""

    key: Key
    config: KernelConfig
    record: Result | None


def choose(spec: KernelSpec, shape: Shape, gpu: Gpu, memory: Memory) -> Choice:
    """The best config measured under the call's key, else the default of its bucket.

    A record of another bucket, GPU, Triton or template is not used: `Memory.near_misses` finds those.
    """
    bucket = bucket_of(shape)
    key = Key.here(gpu.name, spec, bucket, templates_hash(spec))
    record = memory.best(key)
    if record is not None and why_invalid(spec, record.config, gpu) is None:
        return Choice(key, record.config, record)
    return Choice(key, default_config(spec, representative(bucket, spec.group), gpu), None)


class Dispatcher:
    """Chooses and loads kernels, each once: `memory` is asked on the first call of a bucket only."""

    def __init__(self, memory: Memory):
        self._memory = memory
        self._kernels: dict[Key, tuple[Choice, ModuleType]] = {}

    def kernel(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> tuple[Choice, ModuleType]:
        """What was chosen for a call, and the module to launch."""
        key = Key.here(gpu.name, spec, bucket_of(shape), templates_hash(spec))
        found = self._kernels.get(key)
        if found is None:
            choice = choose(spec, shape, gpu, self._memory)
            found = (choice, load(render(spec, choice.config, gpu)))
            self._kernels[key] = found
        return found


@cache
def default_dispatcher() -> Dispatcher:
    """The process's own, over the user's database and the shipped records. A broken database is passed over."""
    try:
        store = Store(read_only=True)
    except StoreError as error:
        warnings.warn(f"{error} Only shipped records and defaults are used.", stacklevel=2)
        store = None
    return Dispatcher(Memory(store))
