"""`parallax.triton` of parallax-kernel 0.1.1, over our kernels: its training functions, and a decode of its own.

    from parallax_gen.compat.official_triton import parallax_decode

Windows and scales as of `compat.official`.
"""

from __future__ import annotations

from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.drop_in.calls import decode
from parallax_gen.integrations.drop_in.checks import HEADS_LAST, check_sizes, scale_of, window_of
from parallax_gen.integrations.drop_in.official_training import (
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
    """One new query a sequence over its cached keys, its own among them.

    q, r              (batch, 1, heads, head_dim), bf16, fp16 or fp32
    k, v              (batch, seqlen, kv_heads, head_dim), of q's dtype; heads is a multiple of kv_heads
    qk_scale          of q·k; 1/√head_dim by default
    window_size_left  the keys that a query sees at the most; negative for no limit
    cache_start       (batch,) ints: each sequence's first key, those before it being padding

    Returns out, like q and contiguous, without gradients; 0 where a sequence has no key. Raises ValueError, an
    ArgumentError.
    """
    check_sizes(q, r, k, v, HEADS_LAST)
    if q.shape[1] != 1:
        raise ArgumentError("q", f"{q.shape[1]} queries a sequence", "1")
    scale, window = scale_of("qk_scale", qk_scale, q.shape[-1]), window_of("window_size_left", window_size_left)
    return decode(q, r, k, v, scale=scale, window=window, cache_start=cache_start)
