"""`parallax` of parallax-kernel 0.1.1, over our kernels.

    from parallax_gen.compat.official import GraphedDecode, parallax_attn_with_kvcache, parallax_func

Windows: `window_size_left=W` keeps W keys, [i - W + 1, i], as its docstrings say; FlashAttention's (W, 0) keeps W + 1.
Its training kernels are wrong at windows that are no multiple of a square tile; these are right at any. W < 0 is no
window, and W = 0, for which it gives NaN, is refused. Scales are of q·k alone, and greater than 0.
"""

from __future__ import annotations

from parallax_gen.integrations.drop_in.official_decoding import (
    GraphedDecode,
    parallax_attn_with_kvcache,
    parallax_decode,
)
from parallax_gen.integrations.drop_in.official_training import (
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

cute_decode_available = True  # decoding needs no extra here
