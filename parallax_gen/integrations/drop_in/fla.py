"""`fla.ops.parallax` and `fla.ops.parallax.decode` of fla-core 0.6.0, on our kernels.

    from parallax_gen.compat.fla import naive_parallax, parallax_decode, parallax_decode_one_step, parallel_parallax

Tensors are (batch, seqlen, heads, head_dim). With `window_size` a query sees that many keys, its own and those right
before it; None or a negative number means no window, and 0 is refused. `scale` applies only to q·k; it must be greater
than 0, and is 1/√head_dim by default. head_dim is anything up to 256: if it is not a multiple of 8, inputs are copied
and zero-padded.
"""

from __future__ import annotations

from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.drop_in.calls import attend, decode
from parallax_gen.integrations.drop_in.checks import (
    HEADS_LAST,
    ArgumentAssertionError,
    check_half,
    check_sizes,
    parse_scale,
    parse_window,
)
from parallax_gen.oracle.reference import reference_forward

__all__ = ["naive_parallax", "parallax_decode", "parallax_decode_one_step", "parallel_parallax"]


def parallel_parallax(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal Parallax attention over whole sequences, with gradients.

    q, r        (batch, seqlen, heads, head_dim), bf16 or fp16
    k, v        (batch, seqlen, kv_heads, head_dim), of q's dtype; heads is a multiple of kv_heads
    cu_seqlens  (sequences + 1,) int64 or int32 on the same device: sequence n has the rows cu_seqlens[n] to
                cu_seqlens[n + 1] - 1 of a batch of 1. The call waits for the longest length;
                `parallax_gen.parallax_attn_varlen_func`, which takes it as an argument, does not

    Returns out, like q and contiguous. Raises TypeError for other dtypes, ValueError for sizes that do not match; both
    are ArgumentErrors.
    """
    check_half(q)
    check_sizes(q, r, k, v, HEADS_LAST, same_length=True)
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ArgumentError("q", f"a batch of {q.shape[0]}", "a batch of 1, with cu_seqlens")
    scale, window = parse_scale("scale", scale, q.shape[-1]), parse_window("window_size", window_size)
    return attend(q, r, k, v, scale=scale, window=window, cu_seqlens=cu_seqlens)


def naive_parallax(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    window_size: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Parallax attention from its definition, on any device; differentiable. Computed in fp64 (in fla: fp32).

    Sizes as in `parallel_parallax`, any dtype. Without causal, window_size is ignored, and k and v may have another
    length. Returns out, like q. Raises ValueError, an ArgumentError.
    """
    check_sizes(q, r, k, v, HEADS_LAST, same_length=causal)
    window = parse_window("window_size", window_size) if causal else None
    return reference_forward(q, r, k, v, causal=causal, window_size=window, softmax_scale=scale).out.to(q.dtype)


def parallax_decode(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    window_size: int | None = None,
    cache_start: Tensor | None = None,
) -> Tensor:
    """Causal attention of sequences' last queries over their cached keys: a decode step, a chunk or all of a prompt.

    q, r         (batch, seqlen_q, heads, head_dim), bf16, fp16 or fp32: query i is at key seqlen_kv − seqlen_q + i
    k, v         (batch, seqlen_kv, kv_heads, head_dim), of q's dtype; seqlen_kv is seqlen_q or more
    cache_start  (batch,) ints: the index of each sequence's first key; keys before it are padding. A query that sees no
                 key gives 0

    Returns out, like q and contiguous, without gradients. Raises AssertionError if there are more queries than keys,
    ValueError for other sizes that do not match; both are ArgumentErrors.
    """
    check_sizes(q, r, k, v, HEADS_LAST)
    if k.shape[1] < q.shape[1]:
        allowed = f"{q.shape[1]} or more: Cached KV length must cover query length"
        raise ArgumentAssertionError("k", f"{k.shape[1]} keys", allowed)
    scale, window = parse_scale("scale", scale, q.shape[-1]), parse_window("window_size", window_size)
    return decode(q, r, k, v, scale=scale, window=window, cache_start=cache_start)


def parallax_decode_one_step(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    window_size: int | None = None,
    cache_start: Tensor | None = None,
) -> Tensor:
    """`parallax_decode` with one query per sequence, (batch, 1, heads, head_dim). Raises ValueError for more."""
    check_sizes(q, r, k, v, HEADS_LAST)
    if q.shape[1] != 1:
        raise ArgumentError("q", f"{q.shape[1]} queries per sequence", "1 (parallax_decode supports more)")
    scale, window = parse_scale("scale", scale, q.shape[-1]), parse_window("window_size", window_size)
    return decode(q, r, k, v, scale=scale, window=window, cache_start=cache_start)
