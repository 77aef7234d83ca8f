"""Launches compiled kernels directly, without the argument binding that Triton's JIT does in every call.

`launch` of a rendered file passes about twenty arguments through the JIT, which inspects each to find the compiled
kernel. For tensors of the same sizes, strides and alignment it finds the same one. So the first call goes through the
JIT and keeps the compiled kernels; later calls pass their tensors straight to these, with the same grid and scalars.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from parallax_gen.codegen.intercept import Launch, watch_launches

ALIGNMENT = 16  # bytes: Triton specialises code for pointers with this alignment


@dataclass(frozen=True)
class DirectLaunch:
    """One compiled kernel at its grid, the indices of the tensors that it takes, and the scalars after them."""

    kernel: Callable[..., None]  # Triton's compiled kernel at the grid
    tensors: tuple[int, ...]
    scalars: tuple[Any, ...]


def launch_by_jit(
    module: ModuleType, tensors: Sequence[Tensor], scalars: Sequence[float]
) -> tuple[DirectLaunch, ...] | None:
    """Call the rendered module's `launch`, and return its launches for `launch_directly`.

    Returns None if they cannot be made directly: a kernel was not compiled, or takes a tensor that was not given.
    """
    from triton.compiler import CompiledKernel

    # A distinct object for each position, even if one tensor is passed twice.
    inputs = [tensor.detach() for tensor in tensors]
    positions = {id(tensor): position for position, tensor in enumerate(inputs)}
    launches: list[DirectLaunch | None] = []

    def watch(launch: Launch) -> None:
        arguments = launch.arguments
        count = sum(isinstance(argument, Tensor) for argument in arguments)
        all_known = all(id(argument) in positions for argument in arguments[:count])
        if not (isinstance(launch.compiled, CompiledKernel) and all_known):
            launches.append(None)
            return
        indices = tuple(positions[id(argument)] for argument in arguments[:count])
        whole_grid = (*launch.grid, 1, 1)[:3]
        launches.append(DirectLaunch(launch.compiled[whole_grid], indices, arguments[count:]))

    with watch_launches(module, watch):
        module.launch(*inputs, *scalars)
    direct = tuple(launch for launch in launches if launch is not None)
    return direct if direct and len(direct) == len(launches) else None


def launch_directly(launches: tuple[DirectLaunch, ...], tensors: Sequence[Tensor], stream: int) -> None:
    """Launch the compiled kernels on other tensors of the same sizes, strides and alignment."""
    for launch in launches:
        launch.kernel(*[tensors[i] for i in launch.tensors], *launch.scalars, stream=stream)


def are_aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every tensor has the alignment that Triton's specialised code assumes."""
    address = 0
    for tensor in tensors:
        address |= tensor.data_ptr()
    return address % ALIGNMENT == 0
