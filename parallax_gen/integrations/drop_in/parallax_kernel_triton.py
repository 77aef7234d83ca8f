"""`parallax.triton` of parallax-kernel 0.1.1, on our kernels: its training functions and its decode.

    from parallax_gen.compat.parallax_kernel_triton import parallax_decode

Windows and scales as in `compat.parallax_kernel`.
"""

from __future__ import annotations

from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.drop_in.calls import decode
from parallax_gen.integrations.drop_in.checks import HEADS_LAST, check_sizes, parse_scale, parse_window
from parallax_gen.integrations.drop_in.parallax_kernel_training import (
    parallax_bwd,
    parallax_func,
    parallax_fwd,
    parallax_varlen_func,
)

__all__ = ["parallax_bwd", "parallax_decode", "parallax_func", "parallax_fwd", "parallax_varlen_func"]


def parallax_decode(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    qk_scale: float | None = None,
    *,
    window_size_left: int = -1,
    cache_start: Tensor | None = None,
) -> Tensor:
    """Attention of one new query per sequence over its cached keys, including its own.

    q, r              (batch, 1, heads, head_dim), bf16, fp16 or fp32
    k, v              (batch, seqlen, kv_heads, head_dim), of q's dtype; heads is a multiple of kv_heads
    qk_scale          scale of q·k; 1/√head_dim by default
    window_size_left  the largest number of keys that a query sees; negative for no limit
    cache_start       (batch,) ints: the index of each sequence's first key; keys before it are padding

    Returns out, like q and contiguous, without gradients; 0 if a sequence has no key. Raises ValueError, an
    ArgumentError.
    """
    check_sizes(q, r, k, v, HEADS_LAST)
    if q.shape[1] != 1:
        raise ArgumentError("q", f"{q.shape[1]} queries per sequence", "1")
    scale, window = parse_scale("qk_scale", qk_scale, q.shape[-1]), parse_window("window_size_left", window_size_left)
    return decode(q, r, k, v, scale=scale, window=window, cache_start=cache_start)
