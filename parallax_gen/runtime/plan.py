"""What a call of given sizes, strides and types launches: decided once, then done with as little ado as can be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from parallax_gen.codegen.device import gpu_of_device
from parallax_gen.ops.base import Scratch, op_of
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import default_dispatcher, level_of_user
from parallax_gen.runtime.launch_replay import Launched, aligned, record, replay
from parallax_gen.runtime.workspace import Workspace, parts_of

# A cache that grows by a key each step makes a plan each step: past this many, start over.
MOST_PLANS = 4096

Plan = TypeVar("Plan")


class Plans(dict[Hashable, Plan]):
    """Plans by everything that they were checked for: see `key_of`."""

    _everyone: ClassVar[list[Plans[Any]]] = []

    def __init__(self) -> None:
        super().__init__()
        self._everyone.append(self)

    @classmethod
    def forget_all(cls) -> None:
        """For when calls are to launch what is chosen from other records. What a CUDA graph captured stays in it."""
        for plans in cls._everyone:
            plans.clear()

    def remember(self, key: Hashable, plan: Plan) -> None:
        if len(self) >= MOST_PLANS:
            self.clear()
        self[key] = plan


_NUMBERS = frozenset((bool, int, float))


def key_of(*given: Tensor | float | None) -> Hashable:
    """Everything that a plan is checked for: a call with the same key needs no further look at what was given.

    Of tensors their sizes, strides and types, of numbers all, with their types: True is 1 as a key.
    """
    return tuple([
        x if x is None
        else (x.shape, x.stride(), x.dtype, x.get_device()) if type(x) is Tensor
        else (type(x), x) if type(x) in _NUMBERS
        else _key_of_other(x)
        for x in given
    ])  # fmt: skip


def _key_of_other(x: object) -> Hashable:
    """Of a tensor or number by another name, and of anything else, that is like nothing else: checks are to name it."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.get_device()
    return (type(x), x) if isinstance(x, (int, float)) else object()


@dataclass(frozen=True)
class HostPlan:
    """A call that launches no kernel: of CPU tensors, or without any query or key."""

    nothing_seen: bool


class LaunchPlan:
    """Launches a rendered module. Its tensors are always of the sizes and strides that the plan was made for.

    spec     what the module is of: its op says which tensors its `launch` takes
    numbers  what it takes behind them
    renamed  of tensors that a request has under another name than the op, that name
    """

    def __init__(
        self,
        module: ModuleType,
        spec: KernelSpec,
        numbers: tuple[float, ...],
        device: int,
        scratch: Scratch,
        renamed: Mapping[str, str] = MappingProxyType({}),
    ):
        self._module = module
        op = op_of(spec)
        self.own_lengths = op.own_lengths
        given, lengths = ([renamed.get(name, name) for name in of(spec)] for of in (op.given, op.lengths))
        self._given: Callable[[object], tuple[Tensor, ...]] = attrgetter(*given)
        # q is dropped again: of one name alone an attrgetter gives no tuple.
        self._lengths: Callable[[object], tuple[Tensor, ...]] | None = attrgetter(*lengths, "q") if lengths else None
        self._numbers = numbers
        self._device = device
        self.scratch = scratch
        self._workspace = workspace_of(device) if scratch.partials else None
        self._recorded: tuple[Launched, ...] | None = None
        self._seen = False

    def launch(self, request: object, written: tuple[Tensor, ...], workspace: Tensor | None = None) -> None:
        """Launch with the tensors of a request, by their names, on the current stream of their device.

        written    what the kernel writes, in the order of `Op.written`
        workspace  the caller's own, of `workspace.bytes_of(self.scratch)`
        """
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                self._launch(self.in_order(request, written), workspace)
        else:
            self._launch(self.in_order(request, written), workspace)

    def in_order(self, request: object, written: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tensors in the order of the module's `launch`."""
        if self._lengths is None:
            return (*self._given(request), *written)
        return (*self._given(request), *written, *self._lengths(request)[:-1])

    def _launch(self, tensors: tuple[Tensor, ...], workspace: Tensor | None) -> None:
        stream = _raw_stream(self._device)
        if self._workspace is not None:
            scratch = self.scratch
            if workspace is None:
                partials, arrived = self._workspace.get(scratch.partials, scratch.arrived, stream)
            else:
                partials, arrived = parts_of(workspace, scratch)
            tensors = (*tensors, partials, arrived) if scratch.arrived else (*tensors, partials)
        if not aligned(tensors):
            self._module.launch(*tensors, *self._numbers)
        elif self._recorded is not None:
            replay(self._recorded, tensors, stream)
        elif not self._seen:
            self._recorded = record(self._module, tensors, self._numbers)
            self._seen = True
        else:  # a launch that cannot be recorded
            self._module.launch(*tensors, *self._numbers)


def plan_launch(
    spec: KernelSpec,
    shape: Shape,
    numbers: tuple[float, ...],
    device: int,
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> LaunchPlan:
    """The plan to launch the best kernel known for `spec` at `shape`; numbers and renamed as of `LaunchPlan`."""
    choice, module = default_dispatcher().kernel(spec, shape, gpu_of_device(device))
    scratch = op_of(spec).scratch(spec, choice.config, shape.batch, shape.kv_heads, shape.seqlen_q)
    return LaunchPlan(module, spec, numbers, device, scratch, renamed)


def host_plan(q: Tensor, k: Tensor) -> HostPlan | None:
    """The plan of a call that launches nothing; None if it does."""
    if q.numel() == 0 or k.numel() == 0:
        return HostPlan(nothing_seen=True)
    if not q.is_cuda:
        _warn_of_cpu()
        return HostPlan(nothing_seen=False)
    return None


@cache
def workspace_of(device: int) -> Workspace:
    """The scratch that this process's launches on a device share."""
    return Workspace(torch.device("cuda", device))


@cache
def _warn_of_cpu() -> None:
    """Once a process."""
    told = "parallax_gen: these are CPU tensors; they run through the slow fp64 reference"
    warnings.warn(told, stacklevel=level_of_user())


def _raw_stream(device: int) -> int:
    """The handle of the current stream: what Triton itself launches on, at a tenth of torch's price for the object."""
    from triton.runtime import driver

    return int(driver.active.get_current_stream(device))
