"""What the drop-ins refuse: by ArgumentErrors that are also of the type which the package they stand in for raises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.work import default_scale
from parallax_gen.runtime.checks import is_int

HEADS_LAST = ("batch", "seqlen", "heads", "head_dim")
HEADS_FIRST = ("batch", "heads", "seqlen", "head_dim")


class ArgumentTypeError(ArgumentError, TypeError):
    """Where the other package raises TypeError."""


class ArgumentAssertionError(ArgumentError, AssertionError):
    """Where the other package asserts."""


class NotOfferedError(ArgumentError, NotImplementedError):
    """Where the other package raises NotImplementedError."""


def check_half(q: Tensor) -> None:
    """Training is in bf16 and fp16 alone."""
    if not isinstance(q, Tensor) or q.dtype not in (torch.bfloat16, torch.float16):
        raise ArgumentTypeError("q", getattr(q, "dtype", type(q).__name__), "a tensor in bf16 or fp16")


def check_dims(q: Tensor, r: Tensor, k: Tensor, v: Tensor, layout: Sequence[str]) -> None:
    for name, x in zip("qrkv", (q, r, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(name, type(x).__name__, "a tensor")
        if x.dim() != len(layout):
            raise ArgumentError(name, f"shape {tuple(x.shape)}", f"{len(layout)} dimensions: ({', '.join(layout)})")


def check_sizes(
    q: Tensor, r: Tensor, k: Tensor, v: Tensor, layout: Sequence[str], *, same_length: bool = False
) -> None:
    """Whether the four fit each other: k and v may have fewer heads, and if not same_length other lengths."""
    check_dims(q, r, k, v, layout)
    if r.shape != q.shape:
        raise ArgumentError("r", f"shape {tuple(r.shape)}", f"{tuple(q.shape)}, q's shape")
    heads = layout.index("heads")
    check_heads("k", q.shape[heads], k.shape[heads])
    free = {"heads"} if same_length else {"heads", "seqlen"}
    wanted = [name if name in free else size for name, size in zip(layout, q.shape, strict=True)]
    if any(size not in (name, found) for name, size, found in zip(layout, wanted, k.shape, strict=True)):
        raise ArgumentError("k", f"shape {tuple(k.shape)}", f"({', '.join(map(str, wanted))}), to go with q")
    if v.shape != k.shape:
        raise ArgumentError("v", f"shape {tuple(v.shape)}", f"{tuple(k.shape)}, the shape of k")


def check_alike(named: Mapping[str, Tensor]) -> None:
    """Whether all are of the first one's dtype, and where it is."""
    (first, q), *others = named.items()
    for name, x in others:
        if x.dtype != q.dtype or x.device != q.device:
            raise ArgumentError(name, f"{x.dtype} on {x.device}", f"{q.dtype} on {q.device}, as {first} is")


def check_heads(name: str, heads: int, kv_heads: int) -> None:
    if kv_heads == 0 or heads % kv_heads:
        raise ArgumentError(name, f"{kv_heads} kv heads", f"q's {heads} heads must be divisible by them")


def scale_of(name: str, given: float | Tensor | None, head_dim: int) -> float:
    """The scale of q·k: a number greater than 0, 1/√head_dim by default."""
    if given is None:
        return default_scale(head_dim)
    scale = float(given)
    if not 0 < scale < math.inf:
        raise ArgumentError(name, given, "a number greater than 0")
    return scale


def window_of(name: str, given: int | None) -> int | None:
    """How many keys a query sees at the most; None for no window, which negative numbers are, too.

    A window of 0 keys is refused: the other packages give NaN for it, or zeros.
    """
    if given is None:
        return None
    if not is_int(given):
        raise ArgumentTypeError(name, repr(given), "an int")
    if given == 0:
        raise ArgumentError(name, given, "1 key or more; negative for no window")
    return given if given > 0 else None
