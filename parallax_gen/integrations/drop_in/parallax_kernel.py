"""`parallax` of parallax-kernel 0.1.1, on our kernels.

    from parallax_gen.compat.parallax_kernel import GraphedDecode, parallax_attn_with_kvcache, parallax_func

Windows: `window_size_left=W` keeps W keys, [i - W + 1, i], as parallax-kernel's docstrings say; FlashAttention's (W, 0)
keeps W + 1. parallax-kernel's training kernels are wrong for windows that are not a multiple of a square tile; ours are
correct for all. W < 0 means no window. W = 0, for which parallax-kernel gives NaN, is refused. Scales apply only to q·k
and must be greater than 0.
"""

from __future__ import annotations

from parallax_gen.integrations.drop_in.parallax_kernel_decoding import (
    GraphedDecode,
    parallax_attn_with_kvcache,
    parallax_decode,
)
from parallax_gen.integrations.drop_in.parallax_kernel_training import (
    parallax_bwd,
    parallax_func,
    parallax_fwd,
    parallax_reference,
    parallax_varlen_func,
)

__all__ = [
    "GraphedDecode",
    "cute_decode_available",
    "parallax_attn_with_kvcache",
    "parallax_bwd",
    "parallax_decode",
    "parallax_func",
    "parallax_fwd",
    "parallax_reference",
    "parallax_varlen_func",
]

cute_decode_available = True  # decoding needs no optional dependency here
