"""What the public functions accept: every argument looked at before anything is launched, and named if it won't do.

Written so that torch.compile can trace it: sizes that are symbols there are compared with each other at the most.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.spec import DECODE_HEAD_DIMS, LARGEST_HEAD_DIM

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# Kernels add up offsets within a block of rows or keys, of 128 at the most, in 32 bits; from block to block in 64.
FURTHEST_ROW = 2**24 - 1


class Request(NamedTuple):
    """Attention of whole sequences, as a caller asks for it: in this order the arguments of the ops, too.

    Dense: q, r (batch, seqlen_q, heads, head_dim); k, v (batch, seqlen_kv, kv_heads, head_dim), no cu_seqlens.
    Packed: (total_q, heads, head_dim) and (total_k, kv_heads, head_dim), and where each sequence begins.
    """

    q: Tensor
    r: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    window_size: int | None
    softmax_scale: float | None


# Functions, not properties: torch.compile of torch 2.9 traces no property of a NamedTuple.


def inputs_of(asked: Request) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return asked.q, asked.r, asked.k, asked.v


def starts_of(asked: Request) -> tuple[Tensor, ...]:
    """cu_seqlens_q and cu_seqlens_k of packed sequences."""
    return () if asked.cu_seqlens_q is None or asked.cu_seqlens_k is None else (asked.cu_seqlens_q, asked.cu_seqlens_k)


def check_numbers(asked: Request) -> None:
    """Whether all but the tensors will do: in every call, for a plan's key takes True for 1."""
    check_flag("causal", asked.causal)
    window, causal = asked.window_size, asked.causal
    if window is not None:
        if not _is_int(window) or window < 1:
            raise ArgumentError("window_size", repr(window), "an int of 1 or more, or None for no window")
        if not causal:
            raise ArgumentError("window_size", f"{window} without causal", "None, or a window with causal=True")
    for name, longest in (("max_seqlen_q", asked.max_seqlen_q), ("max_seqlen_k", asked.max_seqlen_k)):
        if not _is_int(longest) or longest < 0:
            raise ArgumentError(name, repr(longest), "an int of 0 or more")
    _check_scale(asked.softmax_scale)


def check_request(asked: Request, packed: bool, out: Tensor | None = None) -> None:
    """Whether its tensors fit. Raises ArgumentError at the first that does not."""
    q = asked.q
    check_inputs(*inputs_of(asked), packed=packed)
    if q.shape[-1] % 8 or not 0 < q.shape[-1] <= LARGEST_HEAD_DIM:
        raise ArgumentError("q", f"head_dim {q.shape[-1]}", f"a multiple of 8 from 8 to {LARGEST_HEAD_DIM}")
    if packed:
        _check_packing(asked)
    _check_out(out, q)


def check_decode(
    q: Tensor,
    r: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    page_table: Tensor | None,
    softmax_scale: float | None,
    out: Tensor | None,
) -> None:
    """Whether a query can be attended so. Raises ArgumentError at the first argument that won't do."""
    check_inputs(q, r, k_cache, v_cache, paged=page_table is not None, names=("q", "r", "k_cache", "v_cache"))
    if q.shape[3] not in DECODE_HEAD_DIMS:
        raise ArgumentError("q", f"head_dim {q.shape[3]}", " or ".join(map(str, DECODE_HEAD_DIMS)))
    _check_out(out, q)
    _check_scale(softmax_scale)
    if q.shape[1] != 1:
        raise ArgumentError("q", f"{q.shape[1]} queries a sequence", "1: the shape (batch, 1, heads, head_dim)")
    if cache_seqlens is not None:
        _check_lengths(cache_seqlens, q)
    if page_table is not None:
        _check_pages(page_table, cache_seqlens, q)


def check_inputs(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    packed: bool = False,
    paged: bool = False,
    names: tuple[str, str, str, str] = ("q", "r", "k", "v"),
) -> None:
    """Whether the inputs fit each other. Raises ArgumentError at the first that does not."""
    layout = ("total", "heads", "head_dim") if packed else ("batch", "seqlen", "heads", "head_dim")
    for name, tensor in zip(names, (q, r, k, v), strict=True):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(name, type(tensor).__name__, "a tensor")
        if tensor.dim() != len(layout):
            allowed = f"{len(layout)} dimensions: ({', '.join(layout)})"
            raise ArgumentError(name, f"shape {tuple(tensor.shape)}", allowed)
        if tensor.dtype not in DTYPE_NAMES:
            raise ArgumentError(name, tensor.dtype, ", ".join(DTYPE_NAMES.values()))
        if tensor.dtype != q.dtype:
            raise ArgumentError(name, tensor.dtype, f"{q.dtype}, as q has")
        if tensor.device != q.device:
            raise ArgumentError(name, f"on {tensor.device}", f"on {q.device}, where q is")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ArgumentError(name, f"strides {tensor.stride()}", "a contiguous last dimension (stride 1)")
        if tensor.stride(-3) > FURTHEST_ROW:
            raise ArgumentError(name, f"{tensor.stride(-3)} elements from row to row", f"at most {FURTHEST_ROW}")
    if q.device.type not in ("cuda", "cpu"):
        raise ArgumentError("q", f"on {q.device}", "a CUDA or CPU tensor")
    _, r_name, k_name, v_name = names
    *batch, _, heads, head_dim = q.shape
    if r.shape != q.shape:
        raise ArgumentError(r_name, f"shape {tuple(r.shape)}", f"{tuple(q.shape)}, q's shape")
    if (not paged and list(k.shape[:-3]) != batch) or k.shape[-1] != head_dim:
        first = ["pages", "page_size"] if paged else [*batch, layout[-3]]
        fitting = ", ".join(map(str, (*first, layout[-2], head_dim)))
        raise ArgumentError(k_name, f"shape {tuple(k.shape)}", f"({fitting}), to go with q")
    if k.shape[-2] == 0 or heads == 0 or heads % k.shape[-2]:
        raise ArgumentError(k_name, f"{k.shape[-2]} kv heads", f"a divisor of q's {heads} heads")
    if v.shape != k.shape:
        raise ArgumentError(v_name, f"shape {tuple(v.shape)}", f"{tuple(k.shape)}, the shape of {k_name}")


def _check_out(out: Tensor | None, q: Tensor) -> None:
    if out is None:
        return
    if not isinstance(out, Tensor):
        raise ArgumentError("out", type(out).__name__, "a tensor or None")
    fits = out.shape == q.shape and out.dtype == q.dtype and out.device == q.device
    if not fits or out.stride(-1) != 1 or out.stride(-3) > FURTHEST_ROW:
        got = f"shape {tuple(out.shape)}, {out.dtype}, strides {out.stride()}, on {out.device}"
        allowed = f"shape {tuple(q.shape)}, {q.dtype}, on {q.device}, the last dimension contiguous"
        raise ArgumentError("out", got, allowed)


def check_flag(name: str, flag: bool) -> None:
    if type(flag) is not bool:
        raise ArgumentError(name, repr(flag), "True or False")


def _check_scale(softmax_scale: float | None) -> None:
    if softmax_scale is not None and not (isinstance(softmax_scale, (int, float)) and 0 < softmax_scale < math.inf):
        raise ArgumentError("softmax_scale", repr(softmax_scale), "a number greater than 0")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_packing(asked: Request) -> None:
    first, device = asked.cu_seqlens_q, asked.q.device
    for name, starts in (("cu_seqlens_q", first), ("cu_seqlens_k", asked.cu_seqlens_k)):
        allowed = f"an int32 tensor of shape (batch + 1,), contiguous, on {device}"
        if not isinstance(starts, Tensor):
            raise ArgumentError(name, type(starts).__name__, allowed)
        right = starts.dtype == torch.int32 and starts.dim() == 1 and starts.shape[0] > 0
        if not right or not starts.is_contiguous() or starts.device != device:
            raise ArgumentError(name, f"{starts.dtype} of shape {tuple(starts.shape)} on {starts.device}", allowed)
        if first is not None and starts.shape != first.shape:
            raise ArgumentError(name, f"shape {tuple(starts.shape)}", f"{tuple(first.shape)}, as cu_seqlens_q has")


def _check_pages(page_table: object, cache_seqlens: Tensor | None, q: Tensor) -> None:
    allowed = f"an int32 tensor of shape ({q.shape[0]}, pages of a sequence at the most) on {q.device}"
    if not isinstance(page_table, Tensor):
        raise ArgumentError("page_table", type(page_table).__name__, allowed)
    right = page_table.dtype == torch.int32 and page_table.dim() == 2 and page_table.shape[0] == q.shape[0]
    if not right or page_table.device != q.device or page_table.stride(1) != 1:
        got = f"{page_table.dtype} of shape {tuple(page_table.shape)}, strides {page_table.stride()}"
        raise ArgumentError("page_table", f"{got}, on {page_table.device}", f"{allowed}, its rows contiguous")
    if cache_seqlens is None:
        raise ArgumentError("cache_seqlens", "None with a page_table", "each sequence's length, a tensor")


def _check_lengths(cache_seqlens: object, q: Tensor) -> None:
    allowed = f"an int, or an int32 tensor of shape ({q.shape[0]},), contiguous, on {q.device}"
    if not isinstance(cache_seqlens, Tensor):
        raise ArgumentError("cache_seqlens", type(cache_seqlens).__name__, allowed)
    right = cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == q.shape[:1]
    if not right or not cache_seqlens.is_contiguous() or cache_seqlens.device != q.device:
        got = f"{cache_seqlens.dtype} of shape {tuple(cache_seqlens.shape)} on {cache_seqlens.device}"
        raise ArgumentError("cache_seqlens", got, allowed)
