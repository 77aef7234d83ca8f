"""Records a launch once and repeats it without the argument binding that Triton's JIT does in every call.

`launch` of a rendered file passes about twenty arguments through the JIT, which inspects each to find the compiled
kernel. For tensors of the same sizes, strides and alignment it finds the same one. So the first launch is recorded,
and later ones pass their tensors straight to the recorded compiled kernels, with the same grid and scalars.
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
class RecordedKernel:
    """One kernel of a recorded launch: indices of the tensors that it takes, and the scalars after them."""

    run: Callable[..., None]  # Triton's compiled kernel at its grid
    tensors: tuple[int, ...]
    scalars: tuple[Any, ...]


def record_launch(
    module: ModuleType, tensors: Sequence[Tensor], scalars: Sequence[float]
) -> tuple[RecordedKernel, ...] | None:
    """Launch the rendered module on these arguments and return the kernels that it launched.

    Returns None if the launch cannot be repeated that way.
    """
    from triton.compiler import CompiledKernel

    # A distinct object for each position, even if one tensor is passed twice.
    inputs = [tensor.detach() for tensor in tensors]
    positions = {id(tensor): position for position, tensor in enumerate(inputs)}
    recorded: list[RecordedKernel | None] = []

    def watch(launch: Launch) -> None:
        arguments = launch.arguments
        count = sum(isinstance(argument, Tensor) for argument in arguments)
        all_known = all(id(argument) in positions for argument in arguments[:count])
        if not (isinstance(launch.compiled, CompiledKernel) and all_known):
            recorded.append(None)
            return
        indices = tuple(positions[id(argument)] for argument in arguments[:count])
        whole_grid = (*launch.grid, 1, 1)[:3]
        recorded.append(RecordedKernel(launch.compiled[whole_grid], indices, arguments[count:]))

    with watch_launches(module, watch):
        module.launch(*inputs, *scalars)
    kernels = tuple(kernel for kernel in recorded if kernel is not None)
    return kernels if kernels and len(kernels) == len(recorded) else None


def relaunch(kernels: tuple[RecordedKernel, ...], tensors: Sequence[Tensor], stream: int) -> None:
    """Launch the recorded kernels on other tensors of the same sizes, strides and alignment."""
    for kernel in kernels:
        kernel.run(*[tensors[i] for i in kernel.tensors], *kernel.scalars, stream=stream)


def are_aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every tensor has the alignment that Triton's specialised code assumes."""
    address = 0
    for tensor in tensors:
        address |= tensor.data_ptr()
    return address % ALIGNMENT == 0
