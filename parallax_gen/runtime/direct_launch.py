"""Launches compiled kernels directly, without the argument binding that Triton's JIT does in every call.

`launch` of a rendered file passes about twenty arguments through the JIT, which inspects each to find the compiled
kernel. For tensors of the same sizes, strides and alignment it finds the same one. So the first call goes through the
JIT and keeps the compiled kernels; later calls pass their tensors' addresses straight to Triton's launcher in C, with
the same grid and scalars. Given an address in place of a tensor, that launcher need not ask the driver about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from operator import itemgetter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from parallax_gen.codegen.intercept import Launch, watch_launches

ALIGNMENT = 16  # bytes: Triton specialises code for pointers with this alignment


@dataclass(frozen=True)
class DescriptorOf:
    """A tensor descriptor that a launch makes anew: of the tensor at an index, or of that and the next as one tensor.

    template  the descriptor of the first launch, without its tensor
    """

    template: Any
    index: int
    with_next: bool

    @classmethod
    def of(cls, descriptor: Any, index: int) -> DescriptorOf:
        template = copy(descriptor)
        template.base = None
        return cls(template, index, len(descriptor.shape) > descriptor.base.dim())

    def make(self, tensors: Sequence[Tensor], addresses: Sequence[int]) -> Any:
        """The descriptor. Its checks are skipped: the caller knows that sizes, strides and alignment are allowed."""
        descriptor, tensor = copy(self.template), tensors[self.index]
        descriptor.base = tensor
        if self.with_next:
            distance = addresses[self.index + 1] - addresses[self.index]
            descriptor.strides = [distance // tensor.element_size(), *self.template.strides[1:]]
        return descriptor


@dataclass(frozen=True)
class DirectLaunch:
    """One compiled kernel at its grid, and its arguments: descriptors, tensors by their indices, and scalars."""

    kernel: Callable[..., None]  # Triton's compiled kernel at the grid: calls the hooks of profilers
    descriptors: tuple[DescriptorOf, ...]
    tensors: tuple[int, ...]
    scalars: tuple[Any, ...]
    # The same kernel without hooks: takes the stream and the addresses of all tensors. None: this Triton has another
    # launcher, or the kernel takes descriptors, or needs memory in each launch.
    by_address: Callable[[int, Sequence[int]], None] | None


def launch_by_jit(
    module: ModuleType, tensors: Sequence[Tensor], scalars: Sequence[float]
) -> tuple[DirectLaunch, ...] | None:
    """Call the rendered module's `launch`, and return its launches for `launch_directly`.

    Returns None if they cannot be made directly: a kernel was not compiled, or takes a tensor that was not given. For
    AMD GPUs Triton compiles also for the size of each tensor's storage, so that each launch needs its argument binding.
    """
    if torch.version.hip:
        module.launch(*tensors, *scalars)
        return None
    from triton.compiler import CompiledKernel
    from triton.tools.tensor_descriptor import TensorDescriptor

    # A distinct object for each position, even if one tensor is passed twice.
    inputs = [tensor.detach() for tensor in tensors]
    positions = {id(tensor): position for position, tensor in enumerate(inputs)}
    launches: list[DirectLaunch | None] = []

    def watch(launch: Launch) -> None:
        described = tuple(takewhile(lambda argument: isinstance(argument, TensorDescriptor), launch.arguments))
        arguments = launch.arguments[len(described) :]
        count = sum(isinstance(argument, Tensor) for argument in arguments)
        tensors = (*(descriptor.base for descriptor in described), *arguments[:count])
        all_known = all(id(tensor) in positions for tensor in tensors)
        if not (isinstance(launch.compiled, CompiledKernel) and all_known):
            launches.append(None)
            return
        descriptors = tuple(DescriptorOf.of(descriptor, positions[id(descriptor.base)]) for descriptor in described)
        indices, scalars = tuple(positions[id(argument)] for argument in arguments[:count]), arguments[count:]
        whole_grid = (*launch.grid, 1, 1)[:3]
        by_address = None if described else _launcher_by_address(launch.compiled, whole_grid, indices, scalars)
        launches.append(DirectLaunch(launch.compiled[whole_grid], descriptors, indices, scalars, by_address))

    with watch_launches(module, watch):
        module.launch(*inputs, *scalars)
    direct = tuple(launch for launch in launches if launch is not None)
    return direct if direct and len(direct) == len(launches) else None


def launch_directly(
    launches: tuple[DirectLaunch, ...], tensors: Sequence[Tensor], addresses: Sequence[int], stream: int
) -> None:
    """Launch the compiled kernels on other tensors of the same sizes, strides and alignment, at these addresses."""
    hooked = _launches_are_hooked()
    for launch in launches:
        if launch.by_address is None or hooked:
            descriptors = [descriptor.make(tensors, addresses) for descriptor in launch.descriptors]
            launch.kernel(*descriptors, *[tensors[i] for i in launch.tensors], *launch.scalars, stream=stream)
        else:
            launch.by_address(stream, addresses)


def are_aligned(addresses: Sequence[int]) -> bool:
    """Whether every address has the alignment that Triton's specialised code assumes."""
    bits = 0
    for address in addresses:
        bits |= address
    return bits % ALIGNMENT == 0


def _launches_are_hooked() -> bool:
    """Whether a profiler wants to be called at each launch of Triton."""
    knobs = _triton_knobs().runtime
    try:
        return bool(knobs.launch_enter_hook.calls or knobs.launch_exit_hook.calls)
    except AttributeError:  # a function in place of Triton's chain of hooks
        return True


@cache
def _triton_knobs() -> Any:
    """Triton's settings. Cached, because an import statement takes longer than the rest of the check."""
    from triton import knobs

    return knobs


def _launcher_by_address(
    compiled: Any, grid: tuple[int, ...], indices: tuple[int, ...], scalars: tuple[Any, ...]
) -> Callable[[int, Sequence[int]], None] | None:
    """Triton's launcher in C with all arguments that are the same in every launch; see `DirectLaunch.by_address`.

    The arguments that it takes before the kernel's differ between versions of Triton. Triton's own launcher in Python
    computes them here once, when it calls a function in place of the one in C.
    """
    launcher: Any = copy(getattr(compiled, "run", None))
    launch = getattr(launcher, "launch", None)
    needs = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")  # memory or state of each launch
    if launch is None or len(indices) < 2 or any(getattr(launcher, name, False) for name in needs):
        return None
    calls: list[tuple[Any, ...]] = []
    launcher.launch = lambda *arguments: calls.append(arguments)
    arguments = (*indices, *scalars)
    launcher(*grid, 0, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
    (call,) = calls
    select = itemgetter(*indices)
    if call[-1] == arguments:  # Triton 3.7 and later: the kernel's arguments are one tuple
        constant = call[4:-1]
        return lambda stream, addresses: launch(*grid, stream, *constant, (*select(addresses), *scalars))
    constant = call[4 : -len(arguments)]
    return lambda stream, addresses: launch(*grid, stream, *constant, *select(addresses), *scalars)
