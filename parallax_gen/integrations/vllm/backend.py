"""The attention backend of Parallax models in vLLM: see `parallax_gen.integrations.vllm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm._custom_ops import reshape_and_cache_flash
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionImpl, AttentionMetadataBuilder

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.spec import LARGEST_HEAD_DIM
from parallax_gen.runtime.invariance import is_batch_invariant
from parallax_gen.runtime.kvcache import parallax_attn_with_kvcache

# vLLM's names of 8-bit caches. It stores them as uint8.
_CACHE_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@dataclass
class ParallaxMetadata:
    """What all layers of a step share: fields of vLLM's CommonAttentionMetadata.

    query_start_loc    (requests + 1,) int32: the first token of each request in the step
    seq_lens           (requests,) int32: the keys of each request, with those of this step
    block_table        (requests, blocks) int32: each request's blocks, in order
    slot_mapping       (tokens,) int64: where each token's key goes, -1 for padding
    num_actual_tokens  tokens without padding
    max_query_len      the most tokens of a request
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    num_actual_tokens: int
    max_query_len: int


class ParallaxMetadataBuilder(AttentionMetadataBuilder):
    """Kernels read lengths, blocks and starts on the device, so the metadata is vLLM's own tensors."""

    # A graph fixes the grid, by the most tokens of a request: it serves batches whose requests all have as many.
    _cudagraph_support: ClassVar[Any] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> ParallaxMetadata:
        """The metadata of a step. Raises ArgumentError unless attention is causal."""
        common = common_attn_metadata
        if common.causal is not True:
            raise ArgumentError("causal", common.causal, "True")
        return ParallaxMetadata(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.slot_mapping,
            common.num_actual_tokens,
            common.max_query_len,
        )


class ParallaxAttentionBackend(AttentionBackend):
    """The backend of `layer.ParallaxAttention`. Decoder attention over pages of any size, bf16, fp16, or 8-bit."""

    accept_output_buffer = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *_CACHE_DTYPES]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks it up among its own names

    @staticmethod
    def get_impl_cls() -> type[ParallaxAttentionImpl]:
        return ParallaxAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[ParallaxMetadataBuilder]:
        return ParallaxMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return (num_blocks, 2, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Blocks first in memory, then the layers if they share a tensor."""
        return (1, 0, 2, 3, 4, 5) if include_num_layers_dimension else (0, 1, 2, 3, 4)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and 0 < head_size <= LARGEST_HEAD_DIM

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return bool(capability.major >= 8)


class ParallaxAttentionImpl(AttentionImpl):
    """One layer. num_heads: the heads of q, then those of r; heads_of_r is half of them."""

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
        *,
        heads_of_r: int = 0,
    ):
        if 2 * heads_of_r != num_heads:
            allowed = "layers of ParallaxAttention, whose queries are q and r: a softmax model needs another backend"
            raise ArgumentError("attention backend", "CUSTOM for a layer without r", allowed)
        if alibi_slopes is not None:
            raise ArgumentError("alibi_slopes", "a list", "None")
        if attn_type != "decoder":
            raise ArgumentError("attn_type", attn_type, "decoder")
        if torch.version.hip and kv_cache_dtype in _CACHE_DTYPES:
            allowed = "auto, float16 or bfloat16 on AMD GPUs, where vLLM may store other 8-bit floats"
            raise ArgumentError("kv_cache_dtype", kv_cache_dtype, allowed)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.sliding_window, self.kv_cache_dtype = sliding_window, kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or None
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: ParallaxMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the new keys and values to the cache, and the attention of q and r to the beginning of output.

        query, output  (tokens, 2 * heads, head_size)
        key, value     (tokens, kv_heads, head_size)
        kv_cache       (blocks, 2, block_size, kv_heads, head_size)
        attn_metadata  None while vLLM measures memory
        """
        if output_scale is not None or output_block_scale is not None:
            raise ArgumentError("output_scale", "a tensor", "None: the output is not quantized")
        if attn_metadata is None:
            return output.fill_(0)
        k_cache, v_cache = kv_cache.unbind(1)
        if key is not None and value is not None and self.kv_sharing_target_layer_name is None:
            reshape_and_cache_flash(
                key,
                value,
                k_cache,
                v_cache,
                attn_metadata.slot_mapping,
                self.kv_cache_dtype,
                layer._k_scale,
                layer._v_scale,
            )
        k_scale, v_scale = None, None
        if dtype := _CACHE_DTYPES.get(self.kv_cache_dtype):
            k_cache, v_cache = k_cache.view(dtype), v_cache.view(dtype)
            k_scale, v_scale = layer._k_scale.reshape(-1), layer._v_scale.reshape(-1)
        tokens, heads = attn_metadata.num_actual_tokens, self.num_heads // 2
        q, r, out = query[:tokens, :heads], query[:tokens, heads:], output_of_q(output, tokens)
        starts: Tensor | None = attn_metadata.query_start_loc
        max_seqlen_q: int | None = attn_metadata.max_query_len
        one_token_each = max_seqlen_q == 1 and attn_metadata.query_start_loc.shape[0] - 1 == tokens
        # A decode step. Batch-invariant, it takes the kernel of steps in which other requests have several tokens.
        if one_token_each and not is_batch_invariant(None):
            q, r, out, starts, max_seqlen_q = q.unsqueeze(1), r.unsqueeze(1), out.unsqueeze(1), None, None
        parallax_attn_with_kvcache(
            q,
            r,
            k_cache,
            v_cache,
            cache_seqlens=attn_metadata.seq_lens,
            page_table=attn_metadata.block_table,
            cu_seqlens_q=starts,
            max_seqlen_q=max_seqlen_q,
            causal=True,
            window_size=self.sliding_window,
            softmax_scale=self.scale,
            softcap=self.logits_soft_cap,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
        )
        return output


def output_of_q(output: Tensor, tokens: int) -> Tensor:
    """The first half of the output's memory as (tokens, heads, head_size).

    vLLM allocates outputs for all query heads, but r's heads have none. Side by side, q's need no copy after.
    """
    heads, head_size = output.shape[1] // 2, output.shape[2]
    return output.view(-1)[: tokens * heads * head_size].view(tokens, heads, head_size)
