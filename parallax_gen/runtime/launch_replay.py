"""A launch, recorded once: replayed without the binding of arguments that Triton's JIT does in every call.

`launch` of a rendered file passes some twenty arguments through the JIT, which looks at each to find the compiled
kernel. For tensors of the same sizes, strides and alignment it finds the same one. So the first launch is watched,
and later ones hand their tensors to the compiled kernels it used, with the same grid and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from parallax_gen.codegen.intercept import Launch, watching

ALIGNMENT = 16  # bytes: what Triton's code may assume of a pointer that had it when it compiled


@dataclass(frozen=True)
class Launched:
    """One kernel of a launch: which of the launch's tensors it takes, in order, and the numbers behind them."""

    run: Callable[..., None]  # Triton's compiled kernel at its grid
    tensors: tuple[int, ...]
    numbers: tuple[Any, ...]


def record(module: ModuleType, tensors: Sequence[Tensor], numbers: Sequence[float]) -> tuple[Launched, ...] | None:
    """Launch the rendered module on these tensors and numbers, and return what it launched.

    None if that cannot be replayed.
    """
    from triton.compiler import CompiledKernel

    given = [tensor.detach() for tensor in tensors]  # an object a place, also where one tensor was passed twice
    places = {id(tensor): place for place, tensor in enumerate(given)}
    seen: list[Launched | None] = []

    def watch(launch: Launch) -> None:
        arguments = launch.arguments
        count = sum(isinstance(argument, Tensor) for argument in arguments)
        known = all(id(argument) in places for argument in arguments[:count])
        if not (isinstance(launch.compiled, CompiledKernel) and known):
            seen.append(None)
            return
        slots = tuple(places[id(argument)] for argument in arguments[:count])
        whole_grid = (*launch.grid, 1, 1)[:3]
        seen.append(Launched(launch.compiled[whole_grid], slots, arguments[count:]))

    with watching(module, watch):
        module.launch(*given, *numbers)
    return None if not seen or None in seen else tuple(launched for launched in seen if launched is not None)


def replay(launched: tuple[Launched, ...], tensors: Sequence[Tensor], stream: int) -> None:
    """Launch again on other tensors of the same sizes, strides and alignment."""
    for kernel in launched:
        kernel.run(*[tensors[place] for place in kernel.tensors], *kernel.numbers, stream=stream)


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every tensor begins where Triton's specialised code may assume that it does."""
    address = 0
    for tensor in tensors:
        address |= tensor.data_ptr()
    return address % ALIGNMENT == 0
