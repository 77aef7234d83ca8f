"""The attention layer of a Parallax model in SGLang 0.5.23."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.layers.radix_attention import RadixAttention

if TYPE_CHECKING:
    from torch import Tensor


class ParallaxRadixAttention(RadixAttention):
    """RadixAttention that takes r beside q. Its arguments are RadixAttention's; it needs the backend `parallax_gen`."""

    def forward(
        self, q: Tensor, r: Tensor, k: Tensor, v: Tensor, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        """The heads' outputs, like q.

        q, r  (tokens, num_heads * head_dim), both after RoPE
        k, v  (tokens, num_kv_heads * head_dim)
        """
        out: Tensor = super().forward(q, k, v, forward_batch, save_kv_cache, r=r)
        return out
