"""The launch plan of a call: decided once for its sizes, strides and dtypes, then run with little host overhead."""

from __future__ import annotations

import math
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
from parallax_gen.ops.tile_form import programs_of
from parallax_gen.ops.tiles import TiledOp
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.described import DescribedTensors, described_tensors
from parallax_gen.runtime.direct_launch import DirectLaunch, are_aligned, launch_by_jit, launch_directly
from parallax_gen.runtime.dispatch import default_dispatcher, user_stacklevel
from parallax_gen.runtime.recording import CallCount, call_counts
from parallax_gen.runtime.workspace import Workspace, split_workspace

# A KV cache that grows by one key per step makes one plan per step. Beyond this many plans, all are dropped.
MAX_PLANS = 4096

Plan = TypeVar("Plan")


class PlanCache(dict[Hashable, Plan]):
    """Plans, by `plan_key`."""

    _instances: ClassVar[list[PlanCache[Any]]] = []

    def __init__(self) -> None:
        super().__init__()
        self._instances.append(self)

    @classmethod
    def clear_all(cls) -> None:
        """Drop all plans, so that calls choose kernels anew. Captured CUDA graphs keep their kernels."""
        for plans in cls._instances:
            plans.clear()

    def remember(self, key: Hashable, plan: Plan) -> None:
        if len(self) >= MAX_PLANS:
            self.clear()
        self[key] = plan


def plan_key(q: Tensor, r: Tensor, k: Tensor, v: Tensor, *others: Tensor | float | None) -> Hashable:
    """All properties of the arguments that a plan depends on: a call with a known key needs no further checks.

    A tensor contributes its shape, dtype and device, and its strides unless it is contiguous: strides of dimensions of
    size 1 address nothing. A number contributes its value and its type, because True == 1.

    Most of the host time of a decode step outside Triton is spent here, so the four tensors that every call has are
    written out.
    """
    return (
        q.shape, q.is_contiguous() or q.stride(), q.dtype, q.get_device(),
        r.shape, r.is_contiguous() or r.stride(), r.dtype, r.get_device(),
        k.shape, k.is_contiguous() or k.stride(), k.dtype, k.get_device(),
        v.shape, v.is_contiguous() or v.stride(), v.dtype, v.get_device(),
        *[
            x if x is None or x is False or x is True
            else (x.shape, x.is_contiguous() or x.stride(), x.dtype, x.get_device()) if type(x) is Tensor
            else _key_of_other(x)
            for x in others
        ],
    )  # fmt: skip


def _key_of_other(x: object) -> Hashable:
    """The key of a number or a subclass of Tensor; a unique key for anything else, so that the checks reject it."""
    if isinstance(x, Tensor):
        return x.shape, x.is_contiguous() or x.stride(), x.dtype, x.get_device()
    return (type(x), x) if isinstance(x, (int, float)) else object()


def _stream_handle(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# The current device, and the handle of its current stream: as Triton reads them, in a fraction of the time. Builds of
# torch for the CPU lack these names.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_handle)


@dataclass(frozen=True)
class HostPlan:
    """A call that launches no kernel: on CPU tensors, or (is_empty) without any query or key."""

    is_empty: bool


class LaunchPlan:
    """Launches a rendered module, always on tensors of the sizes and strides that the plan was made for.

    spec             of the module: its op says which tensors its `launch` takes
    scalars          those that `launch` takes after the tensors
    renamed          op's tensor name -> the request's field name, for tensors whose names differ
    described        the tensors that the module loads by descriptors, and another module for tensors that allow none
    count            counts the launches
    programs_per_sm  a tiled op's programs in a launch, for each multiprocessor of the card; inf for other ops
    """

    def __init__(
        self,
        module: ModuleType,
        spec: KernelSpec,
        scalars: tuple[float, ...],
        device: int,
        scratch: Scratch,
        renamed: Mapping[str, str] = MappingProxyType({}),
        described: DescribedTensors | None = None,
        count: CallCount | None = None,
        programs_per_sm: float = math.inf,
    ):
        self._module = module
        op = op_of(spec)
        self.per_sequence_lengths = op.per_sequence_lengths
        given, lengths = ([renamed.get(name, name) for name in names_of(spec)] for names_of in (op.inputs, op.lengths))
        self._given: Callable[[object], tuple[Tensor, ...]] = attrgetter(*given)
        # "q" is appended, and dropped later, because attrgetter of one name returns no tuple.
        self._lengths: Callable[[object], tuple[Tensor, ...]] | None = attrgetter(*lengths, "q") if lengths else None
        self._scalars = scalars
        self._device = device
        self._described = described
        self.programs_per_sm = programs_per_sm
        self.scratch = scratch
        self._count = CallCount() if count is None else count
        self._workspace = shared_workspace(device) if scratch.floats else None
        self._direct: tuple[DirectLaunch, ...] | None = None
        self._was_launched = False

    def launch(self, request: object, written: tuple[Tensor, ...], workspace: Tensor | None = None) -> None:
        """Launch with the tensors of `request`, read by field name, on the current stream of their device.

        written    the tensors that the kernel writes, in the order of `Op.written`
        workspace  the caller's, of `workspace_bytes(self.scratch)` bytes; None for the shared one
        """
        if _current_device() != self._device:
            with torch.cuda.device(self._device):
                self.launch(request, written, workspace)
            return
        self._count.calls += 1
        stream = _current_stream(self._device)
        tensors = self.launch_tensors(request, written)
        if self._workspace is not None:
            scratch = self.scratch
            if workspace is None:
                states, counters = self._workspace.get(scratch.floats, scratch.counters, stream)
            else:
                states, counters = split_workspace(workspace, scratch)
            tensors = (*tensors, states, counters) if scratch.counters else (*tensors, states)
        addresses = list(map(Tensor.data_ptr, tensors))
        if self._described is not None and not self._described.allow(tensors):
            self._described.by_pointers().launch(*tensors, *self._scalars)
        elif not are_aligned(addresses):
            self._module.launch(*tensors, *self._scalars)
        elif self._direct is not None:
            launch_directly(self._direct, tensors, addresses, stream)
        elif not self._was_launched:
            self._direct = launch_by_jit(self._module, tensors, self._scalars)
            self._was_launched = True
        else:  # these kernels cannot be launched directly
            self._module.launch(*tensors, *self._scalars)

    def launch_tensors(self, request: object, written: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tensors in the order that the module's `launch` takes them."""
        if self._lengths is None:
            return (*self._given(request), *written)
        return (*self._given(request), *written, *self._lengths(request)[:-1])


def plan_launch(
    spec: KernelSpec,
    shape: Shape,
    scalars: tuple[float, ...],
    device: int,
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> LaunchPlan:
    """The plan to launch the best known kernel for `spec` at `shape`. scalars, renamed: see `LaunchPlan`."""
    gpu = gpu_of_device(device)
    choice, module = default_dispatcher().kernel(spec, shape, gpu)
    op = op_of(spec)
    config: Any = choice.config
    scratch = op.scratch(spec, config, shape.batch, shape.kv_heads, shape.seqlen_q)
    described, count = described_tensors(spec, config, gpu), call_counts().of(spec, shape)
    per_sm = programs_of(op, config, shape) / gpu.sms if isinstance(op, TiledOp) else math.inf
    return LaunchPlan(module, spec, scalars, device, scratch, renamed, described, count, per_sm)


def host_plan(q: Tensor, k: Tensor) -> HostPlan | None:
    """The plan of a call that launches no kernel; None if the call launches one."""
    if q.numel() == 0 or k.numel() == 0:
        return HostPlan(is_empty=True)
    if not q.is_cuda:
        _warn_about_cpu()
        return HostPlan(is_empty=False)
    return None


@cache
def shared_workspace(device: int) -> Workspace:
    """The workspace that all launches of this process on a device share."""
    return Workspace(torch.device("cuda", device))


@cache
def _warn_about_cpu() -> None:
    """Warn once per process."""
    message = "parallax_gen: these are CPU tensors; they run through the slow fp64 reference"
    warnings.warn(message, stacklevel=user_stacklevel())
