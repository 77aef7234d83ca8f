"""The public functions as both drop-ins call them: tensors left in their dtype, any head_dim, gradients or none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.drop_in.checks import ArgumentTypeError, check_alike
from parallax_gen.runtime.functional import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.runtime.kvcache import parallax_attn_with_kvcache
from parallax_gen.runtime.requests import FURTHEST_ROW
from parallax_gen.runtime.transforms import records_gradients, refuse_transforms, under_a_transform


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
    """Whole sequences (batch, seqlen, heads, head_dim), with gradients; causal is aligned to the last key.

    cu_seqlens  of one batch of packed sequences, each over its own keys, always causal. The longest one's length is
                waited for, as it is in the other packages
    """
    head_dim = q.shape[-1]
    q, r, k, v = (_in_eights(x) for x in (q, r, k, v))
    with _as_given(q):
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
    """Each sequence's last queries over its cached keys, causal, without gradients. Sizes: checked.

    lengths      (batch,) int32 on the same device: how many keys of each sequence count
    cache_start  (batch,) ints, anywhere: the first of them
    """
    if under_a_transform():
        refuse_transforms("decoding", q=q, r=r, k=k, v=v)
    check_alike({"q": q, "r": r, "k": k, "v": v})
    if cache_start is not None:
        if cache_start.shape != q.shape[:1]:
            raise ArgumentError("cache_start", f"shape {tuple(cache_start.shape)}", f"({q.shape[0]},), one a sequence")
        cache_start = cache_start.to(q.device, torch.int32).contiguous()
    head_dim = q.shape[-1]
    q, r, k, v = (_in_eights(x) for x in (q, r, k, v))
    if records_gradients(q, r, k, v):
        q, r, k, v = (x.detach() for x in (q, r, k, v))
    with _as_given(q):
        found = parallax_attn_with_kvcache(
            q, r, k, v, cache_seqlens=lengths, cache_leftpad=cache_start, causal=True, window_size=window,
            softmax_scale=scale, out=out,
        )  # fmt: skip
    return found if head_dim == found.shape[-1] else found[..., :head_dim].contiguous()


def laid_out(x: Tensor) -> Tensor:
    """(…, seqlen, heads, head_dim) of strides that our functions take: copied if need be."""
    return x if x.stride(-1) == 1 and x.stride(-3) <= FURTHEST_ROW else x.contiguous()


def _in_eights(x: Tensor) -> Tensor:
    """`laid_out`, with rows of a multiple of 8 numbers: the zeros behind its own change nothing."""
    return pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else laid_out(x)


def _as_given(q: Tensor) -> AbstractContextManager[object]:
    """Under torch.autocast our functions cast to its dtype; the other packages leave all tensors as they are."""
    kind = q.device.type
    under = kind in ("cuda", "cpu") and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if under else nullcontext()


def _packing(cu_seqlens: Tensor, q: Tensor) -> tuple[Tensor, int]:
    """Where sequences begin, in int32, and the longest one's length."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentTypeError("cu_seqlens", cu_seqlens.dtype, "int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.device != q.device:
        got = f"shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        raise ArgumentError("cu_seqlens", got, f"shape (sequences + 1,) on {q.device}")
    starts = cu_seqlens.int().contiguous()
    return starts, max(0, int(starts.diff().max())) if starts.shape[0] > 1 else 0
