"""The attention layer of a Parallax model in vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention

from parallax_gen.integrations.vllm.backend import ParallaxAttentionBackend


class ParallaxAttention(Attention):
    """vLLM's Attention that takes r beside q.

    vLLM's operator for attention takes q, k and v. So r travels with q, as more query heads, and the backend takes them
    apart. The layer is an Attention, and holds none, so that its scales have the names under which vLLM loads those of
    a checkpoint with a calibrated 8-bit cache.

    num_heads  query heads of this rank; head_size, scale and other options as in vLLM's Attention
    """

    def __init__(self, num_heads: int, head_size: int, scale: float, *, prefix: str, **options: Any):
        options = {"num_kv_heads": num_heads, **options}
        backend = ParallaxAttentionBackend
        super().__init__(
            2 * num_heads, head_size, scale, prefix=prefix, attn_backend=backend, heads_of_r=num_heads, **options
        )
        self.size = num_heads * head_size

    def forward(self, q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The heads' outputs, (tokens, num_heads * head_size).

        q, r  (tokens, num_heads * head_size), both after RoPE
        k, v  (tokens, num_kv_heads * head_size)
        """
        out: Tensor = super().forward(torch.cat((q, r), dim=-1), k, v)
        return out.view(-1)[: q.shape[0] * self.size].view(q.shape[0], self.size)  # see `backend.output_of_q`
