"""The attention backend of Parallax models in SGLang 0.5.23.

SGLang keeps the keys and values of all requests in a pool of tokens, (tokens, kv_heads, head_dim) per layer, whose
pages have page_size tokens; req_to_token has the pool's token of each position of each request. The kernels read the
pool as pages, and for each batch this backend makes a table of the requests' pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.invariance import is_batch_invariant
from parallax_gen.runtime.kvcache import parallax_attn_with_kvcache
from parallax_gen.runtime.requests import CACHE_DTYPE_NAMES


@dataclass(frozen=True)
class ForwardMetadata:
    """What all layers of a forward pass share.

    page_table     (batch, pages) int32: each request's pages, in order
    cache_seqlens  (batch,) int32: the keys of each request, with those of this pass
    cu_seqlens_q   (batch + 1,) int32: the first token of each request in q; None for a decode step, one token each,
                   unless batch-invariant: then steps with chunks of prompts and those without take the same kernel
    max_seqlen_q   the most tokens of a request
    """

    page_table: Tensor
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor | None = None
    max_seqlen_q: int | None = None


def _of_decode_step(page_table: Tensor, cache_seqlens: Tensor) -> ForwardMetadata:
    """The metadata of a step with one token of each request."""
    if not is_batch_invariant(None):
        return ForwardMetadata(page_table, cache_seqlens)
    starts = torch.arange(len(cache_seqlens) + 1, dtype=torch.int32, device=cache_seqlens.device)
    return ForwardMetadata(page_table, cache_seqlens, starts, max_seqlen_q=1)


class ParallaxAttnBackend(AttentionBackend):
    """Decode steps, chunks of prompts and mixed batches; decode steps in CUDA graphs, too.

    Not supported, and refused: speculative decoding, cross-attention, attention that is not causal, and pools that keep
    the keys of windowed layers apart.
    """

    def __init__(self, model_runner: Any):
        super().__init__()
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        if hasattr(self.token_to_kv_pool, "translate_loc_from_full_to_swa"):
            allowed = "a pool with the keys of all layers: --disable-hybrid-swa-memory"
            raise ArgumentError("token_to_kv_pool", type(self.token_to_kv_pool).__name__, allowed)
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.page_size = model_runner.page_size or 1
        self.forward_metadata: ForwardMetadata | None = None
        self._graph_metadata: ForwardMetadata | None = None

    # -- what layers share

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """The metadata of a pass outside CUDA graphs."""
        pages = self._read_pages(forward_batch)
        cache_seqlens = forward_batch.seq_lens.to(torch.int32)
        if forward_batch.forward_mode.is_decode_or_idle():
            self.forward_metadata = _of_decode_step(pages, cache_seqlens)
            return
        ends = torch.cumsum(forward_batch.extend_seq_lens, 0, dtype=torch.int32)
        starts = torch.nn.functional.pad(ends, (1, 0))
        max_seqlen_q = max(map(int, forward_batch.extend_seq_lens_cpu), default=0)
        self.forward_metadata = ForwardMetadata(pages, cache_seqlens, starts, max_seqlen_q)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """The tensors that captured decode steps read: a graph keeps their addresses."""
        device, most_pages = self.req_to_token.device, -(-self.req_to_token.shape[1] // self.page_size)
        pages = torch.zeros((max_bs, most_pages), dtype=torch.int32, device=device)
        self._graph_metadata = _of_decode_step(pages, torch.ones(max_bs, dtype=torch.int32, device=device))

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a decode step is captured or replayed: refresh the tensors that its graph reads."""
        assert self._graph_metadata is not None
        if not forward_batch.forward_mode.is_decode_or_idle():
            raise ArgumentError("forward_mode", forward_batch.forward_mode, "decode, in a CUDA graph")
        batch, pages = forward_batch.batch_size, self._read_pages(forward_batch)
        table, cache_seqlens = self._graph_metadata.page_table[:batch], self._graph_metadata.cache_seqlens[:batch]
        table[:, : pages.shape[1]].copy_(pages)  # the kernels read no entries past a request's length
        cache_seqlens.copy_(forward_batch.seq_lens[:batch])
        starts = self._graph_metadata.cu_seqlens_q
        starts = starts if starts is None else starts[: batch + 1]
        self.forward_metadata = ForwardMetadata(table, cache_seqlens, starts, self._graph_metadata.max_seqlen_q)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """The length of the requests that pad a batch to a captured size."""
        return 1

    def _read_pages(self, forward_batch: Any) -> Tensor:
        """Each request's pages, up to the longest request's last one."""
        spec_info = getattr(forward_batch, "spec_info", None)
        if spec_info is not None:
            raise ArgumentError("spec_info", type(spec_info).__name__, "None: no speculative decoding")
        if getattr(forward_batch, "encoder_lens", None) is not None:
            raise ArgumentError("encoder_lens", "a tensor", "None: no cross-attention")
        lengths = forward_batch.seq_lens_cpu
        longest = self.req_to_token.shape[1] if lengths is None or not len(lengths) else max(int(lengths.max()), 1)
        # A page's first token is a multiple of its size, and tokens of a page lie side by side.
        tokens: Tensor = self.req_to_token[:, : longest : self.page_size][forward_batch.req_pool_indices]
        return (tokens // self.page_size).to(torch.int32)

    # -- a layer

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        *,
        r: Tensor | None = None,
    ) -> Tensor:
        """The attention of a step's tokens: a token of each request, chunks of prompts, or both.

        q, r: (tokens, heads * head_dim). Returns the output, like q.
        """
        metadata = self.forward_metadata
        assert metadata is not None
        if r is None:
            raise ArgumentError("r", None, "the probes: this backend serves layers of ParallaxRadixAttention alone")
        if layer.is_cross_attention or layer.attn_type.value != "decoder":
            raise ArgumentError("layer", f"attention of type {layer.attn_type.value}", "causal self-attention")
        r = r[: q.shape[0]]  # SGLang cuts the padding off q, k and v, but not off r, which it does not know
        k_scale, v_scale = layer.k_scale, layer.v_scale
        if save_kv_cache and k is not None and v is not None:
            loc = forward_batch.out_cache_loc
            if k_scale is None:
                self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v)
            else:  # the pool divides by the scales in place
                self.token_to_kv_pool.set_kv_buffer(layer, loc, k.clone(), v.clone(), k_scale, v_scale)
        k_pages, v_pages = (
            tokens.view(-1, self.page_size, *tokens.shape[1:])
            for tokens in (
                self.token_to_kv_pool.get_key_buffer(layer.layer_id),
                self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            )
        )
        is_8_bit = k_pages.dtype in CACHE_DTYPE_NAMES
        heads = (layer.tp_q_head_num, layer.head_dim)
        shape = (-1, *heads) if metadata.cu_seqlens_q is not None else (-1, 1, *heads)
        out = parallax_attn_with_kvcache(
            q.view(shape),
            r.view(shape),
            k_pages,
            v_pages,
            cache_seqlens=metadata.cache_seqlens,
            page_table=metadata.page_table,
            cu_seqlens_q=metadata.cu_seqlens_q,
            max_seqlen_q=metadata.max_seqlen_q,
            causal=True,
            # SGLang counts the keys before a query's own.
            window_size=layer.sliding_window_size + 1 if layer.sliding_window_size >= 0 else None,
            softmax_scale=layer.scaling,
            softcap=layer.logit_cap or None,
            k_scale=_scale(k_scale) if is_8_bit else None,
            v_scale=_scale(v_scale) if is_8_bit else None,
        )
        return out.view(q.shape[0], -1)

    # What differs between kinds of steps is in the metadata.
    forward_decode = forward_mixed = forward_extend


def _scale(scale: Tensor | None) -> Tensor | None:
    """A layer's scale, a parameter without dimensions, as the kernels take it."""
    return None if scale is None else scale.detach().reshape(-1)
