"""Parallax attention as an entry of transformers' AttentionInterface."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.transformers.masks import keys_of, starts_of
from parallax_gen.runtime.cached import parallax_attn_with_kvcache
from parallax_gen.runtime.checks import records_gradients
from parallax_gen.runtime.functional import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.runtime.transforms import under_a_transform

NAME = "parallax"  # among transformers' attention implementations


def parallax_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    r: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Parallax attention of new tokens over all keys so far: a layer's, with transformers' arguments and layouts.

    query, r        (batch, heads, new tokens, head_dim)
    key, value      (batch, kv_heads, keys, head_dim), from the cache if there is one
    attention_mask  as `masks.parallax_mask` makes it
    scaling         of q·k
    sliding_window  a token sees this many keys at the most, its own and those right before it
    others          cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k: packed sequences, of all batch rows one
                    after the other. What has no bearing on attention is left alone

    Returns (batch, new tokens, heads, head_dim), in value's dtype, for that is what its projection computes in; and
    None, for there are no attention weights. With keys from a cache and no gradients it is
    `parallax_attn_with_kvcache`; under torch.compile one operator, either way.

    Raises ArgumentError for what Parallax attention lacks: dropout, attention weights, sinks, soft caps, other masks.
    """
    if r is None:
        allowed = "a model that parallax_gen.integrations.transformers.convert has given an r_proj"
        raise ArgumentError("attn_implementation", f"{NAME!r} in a {type(module).__name__} without r", allowed)
    _refuse(module, attention_mask, dropout, others)
    q, r, k, v = (x.to(value.dtype).transpose(1, 2) for x in (query, r, key, value))
    q_length, kv_length = q.shape[1], k.shape[1]
    lengths, keys = _given_lengths(attention_mask, others), keys_of(attention_mask)
    options: dict[str, Any] = {"causal": True, "window_size": sliding_window, "softmax_scale": scaling}
    from_cache = q_length < kv_length and lengths is None and (attention_mask is None or keys is not None)
    if from_cache and not (records_gradients(q, r, k, v) or under_a_transform()):
        first, end = keys or (None, None)
        found = parallax_attn_with_kvcache(q, r, k, v, cache_seqlens=end, cache_leftpad=first, **options)
        return cast("Tensor", found), None
    if lengths is None and attention_mask is not None:
        starts = starts_of(attention_mask, q_length, kv_length)
        lengths = starts and (*starts, q_length, kv_length)
    if lengths is None:
        return cast("Tensor", parallax_attn_func(q, r, k, v, **options)), None
    q, r, k, v = (x.flatten(0, 1) for x in (q, r, k, v))
    out = parallax_attn_varlen_func(q, r, k, v, *lengths, **options)
    return cast("Tensor", out).unflatten(0, (-1, q_length)), None


def _given_lengths(mask: Tensor | None, others: dict[str, Any]) -> tuple[Tensor, Tensor, int, int] | None:
    """Where the caller says that packed sequences begin, and how long the longest are."""
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    given = {name: others[name] for name in names if others.get(name) is not None}
    if not given:
        return None
    if len(given) < len(names):
        raise ArgumentError(next(iter(given)), "given without the others", f"all of {', '.join(names)}, or none")
    if mask is not None and mask.shape[:3] != (1, 1, 1):  # one that is packed says the same, by position_ids
        raise ArgumentError("attention_mask", "padding, or a cache, beside cu_seq_lens_q", "None beside it")
    starts_q, starts_k, longest_q, longest_k = given.values()
    return starts_q.int(), starts_k.int(), longest_q, longest_k


def _refuse(module: nn.Module, mask: Tensor | None, dropout: float, others: dict[str, Any]) -> None:
    if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4):
        got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError("attention_mask", got, "None, or (batch, tokens so far) with 0 for padding, to the model")
    if dropout:
        raise ArgumentError("attention_dropout", dropout, "0: Parallax attention has no dropout")
    if others.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        raise ArgumentError("output_attentions", True, "False: Parallax attention does not write its weights out")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise ArgumentError("is_causal", False, "True")
    for name in ("softcap", "s_aux"):
        if others.get(name) is not None:
            raise ArgumentError(name, "one", "None: Parallax attention has no soft caps and no sinks")
