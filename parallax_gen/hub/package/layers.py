"""Layers for `kernels.kernelize`: pure, so they read the options of the layer that adopts their forward.

@use_kernel_forward_from_hub("ParallaxAttention")
class MyAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.causal, self.window_size, self.softmax_scale, self.softcap = True, None, None, None

    def forward(self, q, r, k, v):
        ...
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from parallax_gen.runtime.functional import parallax_attn_func
from parallax_gen.runtime.kvcache import parallax_attn_with_kvcache

__all__ = ["ParallaxAttention", "ParallaxAttentionWithKVCache"]


class ParallaxAttention(nn.Module):
    """Attention over whole sequences: `parallax_attn_func`, which has the shapes and the options."""

    has_backward = True
    can_torch_compile = True

    causal: bool
    window_size: int | None
    softmax_scale: float | None
    softcap: float | None

    def forward(self, q: torch.Tensor, r: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return parallax_attn_func(
            q,
            r,
            k,
            v,
            causal=self.causal,
            window_size=self.window_size,
            softmax_scale=self.softmax_scale,
            softcap=self.softcap,
        )


class ParallaxAttentionWithKVCache(nn.Module):
    """Attention of new queries over a KV cache: `parallax_attn_with_kvcache`, which has the shapes and the options."""

    has_backward = False
    can_torch_compile = True

    causal: bool
    window_size: int | None
    softmax_scale: float | None
    softcap: float | None

    def forward(
        self,
        q: torch.Tensor,
        r: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        cache_seqlens: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        options: dict[str, Any] = {"cache_seqlens": cache_seqlens, "page_table": page_table}
        out = parallax_attn_with_kvcache(
            q,
            r,
            k_cache,
            v_cache,
            causal=self.causal,
            window_size=self.window_size,
            softmax_scale=self.softmax_scale,
            softcap=self.softcap,
            **options,
        )
        return cast("torch.Tensor", out)
