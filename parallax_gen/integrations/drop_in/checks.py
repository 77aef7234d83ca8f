"""Argument checks of the drop-ins: ArgumentErrors that are also of the type that the replaced package raises."""

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
    """For arguments for which the replaced package raises TypeError."""


class ArgumentAssertionError(ArgumentError, AssertionError):
    """For arguments for which the replaced package raises AssertionError."""


class UnsupportedArgumentError(ArgumentError, NotImplementedError):
    """For arguments for which the replaced package raises NotImplementedError."""


def check_half(q: Tensor) -> None:
    """Check that q is bf16 or fp16, as training requires."""
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
    """Check that the sizes match: k and v may have fewer heads than q and, unless same_length, another length."""
    check_dims(q, r, k, v, layout)
    if r.shape != q.shape:
        raise ArgumentError("r", f"shape {tuple(r.shape)}", f"{tuple(q.shape)}, q's shape")
    heads = layout.index("heads")
    check_heads("k", q.shape[heads], k.shape[heads])
    any_size = {"heads"} if same_length else {"heads", "seqlen"}
    expected = [name if name in any_size else size for name, size in zip(layout, q.shape, strict=True)]
    if any(size not in (name, actual) for name, size, actual in zip(layout, expected, k.shape, strict=True)):
        raise ArgumentError("k", f"shape {tuple(k.shape)}", f"({', '.join(map(str, expected))}), to match q")
    if v.shape != k.shape:
        raise ArgumentError("v", f"shape {tuple(v.shape)}", f"{tuple(k.shape)}, the shape of k")


def check_same_dtype_and_device(tensors: Mapping[str, Tensor]) -> None:
    """Check that all tensors have the first one's dtype and device."""
    (first_name, first), *rest = tensors.items()
    for name, x in rest:
        if x.dtype != first.dtype or x.device != first.device:
            raise ArgumentError(
                name, f"{x.dtype} on {x.device}", f"{first.dtype} on {first.device}, as {first_name} is"
            )


def check_heads(name: str, heads: int, kv_heads: int) -> None:
    if kv_heads == 0 or heads % kv_heads:
        raise ArgumentError(name, f"{kv_heads} kv heads", f"q's {heads} heads must be divisible by them")


def parse_scale(name: str, value: float | Tensor | None, head_dim: int) -> float:
    """The scale of q·k: greater than 0, 1/√head_dim by default. Raises ArgumentError."""
    if value is None:
        return default_scale(head_dim)
    scale = float(value)
    if not 0 < scale < math.inf:
        raise ArgumentError(name, value, "a number greater than 0")
    return scale


def parse_window(name: str, value: int | None) -> int | None:
    """The largest number of keys that a query sees; None for no window, which a negative number means too.

    Raises ArgumentError, also for a window of 0 keys: the replaced packages give NaN or zeros for it.
    """
    if value is None:
        return None
    if not is_int(value):
        raise ArgumentTypeError(name, repr(value), "an int")
    if value == 0:
        raise ArgumentError(name, value, "1 key or more; negative for no window")
    return value if value > 0 else None
