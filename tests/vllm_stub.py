"""A stand-in for the parts of vLLM that `parallax_gen.integrations.vllm` uses, with the signatures of its commit
0014ca6b: what its Attention does between a model and a backend, on any device and without an engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class AttentionBackend(ABC):
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    @abstractmethod
    def get_name() -> str: ...

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> Any: ...

    @staticmethod
    @abstractmethod
    def get_builder_cls() -> Any: ...

    @staticmethod
    @abstractmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]: ...

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        raise NotImplementedError

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return True


class AttentionCGSupport(Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


@dataclass
class CommonAttentionMetadata:
    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: bool | Tensor = True


class AttentionMetadataBuilder(ABC):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    @abstractmethod
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        self.kv_cache_spec, self.layer_names, self.vllm_config = kv_cache_spec, layer_names, vllm_config
        self.device = device

    @abstractmethod
    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any: ...

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        return self.build(common_prefix_len=0, common_attn_metadata=common_attn_metadata)


class AttentionImpl(ABC):
    supports_quant_query_input: bool = False

    @abstractmethod
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
    ) -> None: ...

    @abstractmethod
    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor: ...


class AttentionBackendEnum(Enum):
    FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    CUSTOM = None

    def get_path(self, include_classname: bool = True) -> str:
        path = OVERRIDES.get(self, self.value)
        if not path:
            raise ValueError(f"Backend {self.name} must be registered before use")
        return path


OVERRIDES: dict[AttentionBackendEnum, str] = {}


def register_backend(
    backend: AttentionBackendEnum, class_path: str | None = None, is_mamba: bool = False
) -> Callable[[type], type]:
    assert class_path is not None
    OVERRIDES[backend] = class_path
    return lambda x: x


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Store each token of slot_mapping in its slot; -1 is padding. 8-bit caches are uint8."""
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        at = divmod(slot, key_cache.shape[1])
        for x, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
            if kv_cache_dtype == "auto":
                cache[at] = x[token]
            else:
                cache[at] = (x[token] / scale).to(torch.float8_e4m3fn).view(torch.uint8)


class Attention(nn.Module):
    """metadata: what vLLM has in its forward context; None while it measures memory."""

    metadata: Any = None

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        use_alibi_sqrt: bool | None = None,
        cache_config: Any | None = None,
        quant_config: Any | None = None,
        logits_soft_cap: float | None = None,
        per_layer_sliding_window: int | None = None,
        prefix: str = "",
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        attn_backend: type[AttentionBackend] | None = None,
        head_size_v: int | None = None,
        **extra_impl_args: Any,
    ) -> None:
        super().__init__()
        assert attn_backend is not None
        self.num_heads, self.head_size = num_heads, head_size
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.layer_name, self.attn_backend = prefix, attn_backend
        cache_dtype = "auto" if cache_config is None else cache_config.cache_dtype
        self.impl = attn_backend.get_impl_cls()(
            num_heads,
            head_size,
            scale,
            self.num_kv_heads,
            alibi_slopes,
            per_layer_sliding_window,
            cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **extra_impl_args,
        )
        self.backend = AttentionBackendEnum[attn_backend.get_name()]
        self.kv_cache = torch.tensor([])
        self.register_buffer("_k_scale", torch.tensor(1.0))
        self.register_buffer("_v_scale", torch.tensor(1.0))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, output_shape: torch.Size | None = None) -> Tensor:
        assert self.attn_backend.forward_includes_kv_cache_update
        if output_shape is None:
            output_shape = torch.Size((query.shape[0], self.num_heads * self.head_size))
        output = torch.full(output_shape, float("nan"), dtype=query.dtype)
        heads = (-1, self.num_heads, self.head_size)
        self.impl.forward(
            self,
            query.view(heads),
            key.view(-1, self.num_kv_heads, self.head_size),
            value.view(-1, self.num_kv_heads, self.head_size),
            self.kv_cache,
            self.metadata,
            output.view(heads),
        )
        return output.view(-1, output_shape[-1])


# Module -> what it has. The tests compare the signatures with those of an installed vLLM.
MODULES: dict[str, tuple[Any, ...]] = {
    "vllm._custom_ops": (reshape_and_cache_flash,),
    "vllm.model_executor.layers.attention": (Attention,),
    "vllm.v1.attention.backend": (
        AttentionBackend,
        AttentionCGSupport,
        AttentionImpl,
        AttentionMetadataBuilder,
        CommonAttentionMetadata,
    ),
    "vllm.v1.attention.backends.registry": (AttentionBackendEnum, register_backend),
}
