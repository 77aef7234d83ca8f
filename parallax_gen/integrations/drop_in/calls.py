"""Calls our public functions for all drop-ins: without autocast, at any head_dim, with or without gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.drop_in.checks import ArgumentTypeError, check_same_dtype_and_device
from parallax_gen.runtime.functional import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.runtime.kvcache import parallax_attn_with_kvcache
from parallax_gen.runtime.requests import MAX_ROW_STRIDE
from parallax_gen.runtime.transforms import records_gradients, refuse_transforms, transform_is_active


def attend(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attention over whole sequences (batch, seqlen, heads, head_dim), with gradients. causal: aligned to the last key.

    cu_seqlens  for packed sequences in a batch of 1, each over its own keys, always causal. The call waits for the
                longest length, as in the replaced packages
    """
    head_dim = q.shape[-1]
    q, r, k, v = (_padded_to_multiple_of_8(x) for x in (q, r, k, v))
    with _without_autocast(q):
        if cu_seqlens is None:
            out = parallax_attn_func(q, r, k, v, causal=causal, window_size=window, softmax_scale=scale)
        else:
            starts, longest = _packing(cu_seqlens, q)
            out = parallax_attn_varlen_func(
                q[0], r[0], k[0], v[0], starts, starts, longest, longest, causal=True, window_size=window,
                softmax_scale=scale,
            )  # fmt: skip
    out = out if cu_seqlens is None else out[None]
    return out if head_dim == out.shape[-1] else out[..., :head_dim].contiguous()


def decode(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    lengths: Tensor | None = None,
    cache_start: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's last queries over its cached keys, without gradients. Sizes must be checked.

    lengths      (batch,) int32 on the same device: each sequence's number of keys
    cache_start  (batch,) ints on any device: the index of each sequence's first key
    """
    if transform_is_active():
        refuse_transforms("decoding", q=q, r=r, k=k, v=v)
    check_same_dtype_and_device({"q": q, "r": r, "k": k, "v": v})
    if cache_start is not None:
        if cache_start.shape != q.shape[:1]:
            raise ArgumentError(
                "cache_start", f"shape {tuple(cache_start.shape)}", f"({q.shape[0]},), one per sequence"
            )
        cache_start = cache_start.to(q.device, torch.int32).contiguous()
    head_dim = q.shape[-1]
    q, r, k, v = (_padded_to_multiple_of_8(x) for x in (q, r, k, v))
    if records_gradients(q, r, k, v):
        q, r, k, v = (x.detach() for x in (q, r, k, v))
    with _without_autocast(q):
        result = parallax_attn_with_kvcache(
            q, r, k, v, cache_seqlens=lengths, cache_leftpad=cache_start, causal=True, window_size=window,
            softmax_scale=scale, out=out,
        )  # fmt: skip
    return result if head_dim == result.shape[-1] else result[..., :head_dim].contiguous()


def with_supported_strides(x: Tensor) -> Tensor:
    """(…, seqlen, heads, head_dim) in strides that our functions support, copied if necessary."""
    return x if x.stride(-1) == 1 and x.stride(-3) <= MAX_ROW_STRIDE else x.contiguous()


def _padded_to_multiple_of_8(x: Tensor) -> Tensor:
    """`with_supported_strides`, with head_dim zero-padded to a multiple of 8, which does not change the result."""
    return pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else with_supported_strides(x)


def _without_autocast(q: Tensor) -> AbstractContextManager[object]:
    """A context that disables autocast: our functions would cast to its dtype, but the replaced packages do not."""
    device_type = q.device.type
    is_on = device_type in ("cuda", "cpu") and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_on else nullcontext()


def _packing(cu_seqlens: Tensor, q: Tensor) -> tuple[Tensor, int]:
    """cu_seqlens as int32, and the longest length. Raises ArgumentError."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentTypeError("cu_seqlens", cu_seqlens.dtype, "int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.device != q.device:
        got = f"shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        raise ArgumentError("cu_seqlens", got, f"shape (sequences + 1,) on {q.device}")
    starts = cu_seqlens.int().contiguous()
    return starts, max(0, int(starts.diff().max())) if starts.shape[0] > 1 else 0
