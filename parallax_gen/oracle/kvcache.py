"""The oracle with a KV cache: gathers each sequence's keys, then calls the reference for contiguous tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from parallax_gen.oracle.reference import Reference, reference_forward


def reference_cached_forward(
    q: Tensor,
    r: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    causal: bool = False,
    window_size: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> Reference:
    """`reference_forward` of each sequence's queries over its own keys, from cache_leftpad up to cache_seqlens.

    A length below 0 counts as 0, and a length beyond the cache counts as the cache's length.

    Arguments as in `runtime.kvcache.parallax_attn_with_kvcache`. For packed queries out and v_mean are like q, and
    lse and t_mean are (heads, total_q), -inf and 0 in rows that belong to no sequence.
    """
    if page_table is not None:
        k_cache, v_cache = gather_pages(k_cache, page_table), gather_pages(v_cache, page_table)
    heads, batch = q.shape[-2], k_cache.shape[0]
    out = q.new_zeros(q.shape, dtype=torch.float64)
    lse = out.new_full((*q.shape[:-3], heads, q.shape[-3]), -torch.inf)
    result = Reference(out, lse, torch.zeros_like(lse), torch.zeros_like(out))
    lists = (None if x is None else x.tolist() for x in (cache_seqlens, cache_leftpad, cu_seqlens_q))
    lengths, starts, offsets = lists
    for b in range(batch):
        length = k_cache.shape[1] if lengths is None else max(min(lengths[b], k_cache.shape[1]), 0)
        keys = slice(min(max(starts[b], 0), length) if starts is not None else 0, length)
        rows = slice(None) if offsets is None else slice(offsets[b], offsets[b + 1])
        sequence = (b,) if offsets is None else ()
        k, v = (_scaled(x[b, keys], scale) for x, scale in ((k_cache, k_scale), (v_cache, v_scale)))
        q_rows, r_rows = (x[sequence][rows][None] for x in (q, r))
        if q_rows.shape[1] == 0:
            continue
        parts = reference_forward(
            q_rows,
            r_rows,
            k[None],
            v[None],
            causal=causal,
            window_size=window_size,
            softmax_scale=softmax_scale,
            softcap=softcap,
        )
        for tensor, part in zip(result, parts, strict=True):
            if part.dim() == 4:
                tensor[sequence][rows] = part[0]
            else:
                tensor[sequence][..., rows] = part[0]
    return result


def gather_pages(pages: Tensor, page_table: Tensor) -> Tensor:
    """A paged cache (pages, page_size, kv_heads, head_dim) as (batch, seqlen, kv_heads, head_dim).

    page_table  (batch, pages per sequence): each sequence's pages; an index out of range gives an arbitrary page
    """
    indices = page_table.long().clamp(0, pages.shape[0] - 1)
    if pages.element_size() == 1:  # torch 2.9 cannot index float8 on the CPU
        return pages.view(torch.uint8)[indices].view(pages.dtype).flatten(1, 2)
    return pages[indices].flatten(1, 2)


def _scaled(x: Tensor, scale: Tensor | float | None) -> Tensor:
    """(keys, kv_heads, head_dim) times a scale: one for all heads, or one per head."""
    if scale is None:
        return x.double()
    return x.double() * torch.as_tensor(scale, device=x.device).double().reshape(-1, 1)
