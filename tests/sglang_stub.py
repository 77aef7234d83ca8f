"""A stand-in for the parts of SGLang that `parallax_gen.integrations.sglang` uses, with the signatures of 0.5.23: what
its RadixAttention and pools do between a model and a backend, on any device and without an engine.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class ForwardMode(Enum):
    EXTEND = auto()
    DECODE = auto()
    MIXED = auto()
    IDLE = auto()

    def is_decode(self) -> bool:
        return self == ForwardMode.DECODE

    def is_idle(self) -> bool:
        return self == ForwardMode.IDLE

    def is_decode_or_idle(self) -> bool:
        return self in (ForwardMode.DECODE, ForwardMode.IDLE)


class AttentionBackend:
    needs_cpu_seq_lens: bool = True

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.init_forward_metadata_out_graph(forward_batch)
        self.init_forward_metadata_in_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Nothing, by default."""

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Nothing, by default."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        raise NotImplementedError

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        raise NotImplementedError

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        if forward_batch.forward_mode.is_idle():
            return q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        if forward_batch.forward_mode.is_decode():
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)
        return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        raise NotImplementedError

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        raise NotImplementedError


class AttentionType(Enum):
    DECODER = "decoder"
    DECODER_BIDIRECTIONAL = "decoder_bidirectional"
    ENCODER_ONLY = "encoder_only"


class RadixAttention(nn.Module):
    """backend: what SGLang has in its forward context."""

    backend: Any = None

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scaling: float,
        num_kv_heads: int,
        layer_id: int,
        logit_cap: float = 0.0,
        v_head_dim: int = -1,
        sliding_window_size: int = -1,
        is_cross_attention: bool = False,
        pos_encoding_mode: str = "NONE",
        logit_capping_method: str = "tanh",
        quant_config: Any | None = None,
        attn_type: AttentionType = AttentionType.DECODER,
        use_irope: bool = False,
        prefix: str = "",
        use_prefill_attention_wrapper: bool = True,
    ):
        super().__init__()
        self.tp_q_head_num, self.tp_k_head_num, self.tp_v_head_num = num_heads, num_kv_heads, num_kv_heads
        self.head_dim = self.qk_head_dim = head_dim
        self.v_head_dim = v_head_dim if v_head_dim != -1 else head_dim
        self.scaling, self.layer_id, self.logit_cap = scaling, layer_id, logit_cap
        self.sliding_window_size = sliding_window_size or -1
        self.is_cross_attention, self.attn_type = is_cross_attention, attn_type
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        forward_batch: Any,
        save_kv_cache: bool = True,
        key_value_num_tokens: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        k, v = k.view(-1, self.tp_k_head_num, self.qk_head_dim), v.view(-1, self.tp_v_head_num, self.v_head_dim)
        result: Tensor = self.backend.forward(q, k, v, self, forward_batch, save_kv_cache, **kwargs)
        return result


class MHATokenToKVPool:
    """One layer's keys and values. Token 0 is a dummy, as in SGLang."""

    def __init__(self, tokens: int, heads: int, head_dim: int, dtype: torch.dtype):
        self.k, self.v = (torch.full((tokens, heads, head_dim), float("nan")).to(dtype) for _ in range(2))

    def get_key_buffer(self, layer_id: int) -> Tensor:
        return self.k

    def get_value_buffer(self, layer_id: int) -> Tensor:
        return self.v

    def set_kv_buffer(
        self,
        layer: Any,
        loc_info: Tensor,
        cache_k: Tensor,
        cache_v: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        if self.k.dtype != cache_k.dtype:
            cache_k, cache_v = (
                (x if scale is None else x.div_(scale)).to(self.k.dtype)
                for x, scale in ((cache_k, k_scale), (cache_v, v_scale))
            )
        for cache, x in ((self.k, cache_k), (self.v, cache_v)):
            cache.view(torch.uint8)[loc_info] = x.contiguous().view(torch.uint8)


def model_runner(pool: Any, req_to_token: Tensor, page_size: int) -> Any:
    return SimpleNamespace(
        token_to_kv_pool=pool, req_to_token_pool=SimpleNamespace(req_to_token=req_to_token), page_size=page_size
    )


ATTENTION_BACKENDS: dict[str, Any] = {}
CHOICES: list[str] = []
add_attention_backend_choices = CHOICES.extend


def register_attention_backend(name: str) -> Callable[[Any], Any]:
    def decorator(fn: Any) -> Any:
        ATTENTION_BACKENDS[name] = fn
        return fn

    return decorator


# Module -> what it has. The tests compare the signatures with those of an installed SGLang.
MODULES: dict[str, tuple[Any, ...] | dict[str, Any]] = {
    "sglang.srt.layers.attention.base_attn_backend": (AttentionBackend,),
    "sglang.srt.layers.radix_attention": (RadixAttention, AttentionType),
    "sglang.srt.layers.attention.attention_registry": {
        "ATTENTION_BACKENDS": ATTENTION_BACKENDS,
        "register_attention_backend": register_attention_backend,
    },
    "sglang.srt.server_args": {"add_attention_backend_choices": add_attention_backend_choices},
}
