"""Parallax attention as an entry of transformers' AttentionInterface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.functional import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.runtime.kvcache import parallax_attn_with_kvcache
from parallax_gen.runtime.transforms import records_gradients, transform_is_active

NAME = "parallax"  # among transformers' attention implementations


def parallax_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    r: Tensor | Callable[[], Tensor] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **extra_arguments: Any,
) -> tuple[Tensor, None]:
    """Parallax attention of new tokens over all keys so far, with transformers' arguments and layouts.

    query, r        (batch, heads, new tokens, head_dim); r may be a function that computes it
    key, value      (batch, kv_heads, keys, head_dim), from the cache if there is one
    attention_mask  from `parallax_mask`
    scaling         scale of q·k
    sliding_window  a token sees at most this many keys, its own and those right before it
    softcap         cap of the scores, as in Gemma 2
    extra_arguments cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k: packed sequences, over all batch rows
                    one after the other. Arguments that do not affect attention are ignored

    Returns (batch, new tokens, heads, head_dim) in value's dtype, in which the output projection computes, and None
    in place of attention weights. With keys from a cache and no gradients it calls `parallax_attn_with_kvcache`. Under
    torch.compile it is one operator either way.

    Raises ArgumentError for unsupported features: dropout, attention weights, sinks, other masks.
    """
    if r is None:
        allowed = "a model with an r_proj: convert it with parallax_gen.integrations.transformers.convert"
        raise ArgumentError("attn_implementation", f"{NAME!r} in a {type(module).__name__} without r", allowed)
    _check_supported(module, attention_mask, dropout, extra_arguments)
    r = r if isinstance(r, Tensor) else r()
    q, r, k, v = (x.to(value.dtype).transpose(1, 2) for x in (query, r, key, value))
    q_length, kv_length = q.shape[1], k.shape[1]
    lengths, keys = _packing_arguments(attention_mask, extra_arguments), key_range(attention_mask)
    options: dict[str, Any] = {
        "causal": True,
        "window_size": sliding_window,
        "softmax_scale": scaling,
        "softcap": softcap,
    }
    from_cache = q_length < kv_length and lengths is None and (attention_mask is None or keys is not None)
    if from_cache and not (records_gradients(q, r, k, v) or transform_is_active()):
        first, end = keys or (None, None)
        return parallax_attn_with_kvcache(q, r, k, v, cache_seqlens=end, cache_leftpad=first, **options), None
    if lengths is None and attention_mask is not None:
        starts = cu_seqlens_of_mask(attention_mask, q_length, kv_length)
        lengths = starts and (*starts, q_length, kv_length)
    if lengths is None:
        return parallax_attn_func(q, r, k, v, **options), None
    q, r, k, v = (x.flatten(0, 1) for x in (q, r, k, v))
    out = parallax_attn_varlen_func(q, r, k, v, *lengths, **options)
    return out.unflatten(0, (-1, q_length)), None


def _packing_arguments(mask: Tensor | None, extra_arguments: dict[str, Any]) -> tuple[Tensor, Tensor, int, int] | None:
    """cu_seqlens and longest lengths of packed sequences; None if the caller passed none."""
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    packing = {name: extra_arguments[name] for name in names if extra_arguments.get(name) is not None}
    if not packing:
        return None
    if len(packing) < len(names):
        raise ArgumentError(next(iter(packing)), "passed without the others", f"all of {', '.join(names)}, or none")
    if mask is not None and mask.shape[:3] != (1, 1, 1):  # a packed mask, from position_ids, has the same sequences
        raise ArgumentError(
            "attention_mask", "padding, or a cache, together with cu_seq_lens_q", "None with cu_seq_lens_q"
        )
    starts_q, starts_k, longest_q, longest_k = packing.values()
    return starts_q.int(), starts_k.int(), longest_q, longest_k


def _check_supported(module: nn.Module, mask: Tensor | None, dropout: float, extra_arguments: dict[str, Any]) -> None:
    if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4):
        got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(
            "attention_mask", got, "None, or pass the model an attention_mask (batch, tokens so far) with 0 for padding"
        )
    if dropout:
        raise ArgumentError("attention_dropout", dropout, "0: Parallax attention has no dropout")
    if extra_arguments.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        raise ArgumentError("output_attentions", True, "False: Parallax attention does not return attention weights")
    if not getattr(module, "is_causal", True) or extra_arguments.get("is_causal") is False:
        raise ArgumentError("is_causal", False, "True")
    if extra_arguments.get("s_aux") is not None:
        raise ArgumentError("s_aux", "a value", "None: Parallax attention has no sinks")


# -- transformers' masks in the form of our functions: the range of each sequence's keys, not a boolean matrix.
#
# A mask is None if every query sees all keys up to its own; otherwise it is an int32 tensor. It has four dimensions, so
# that transformers passes it to the layers unchanged. Its shape identifies its kind:
#
#     cached  (2, 1, 1, batch)         each sequence's first key and end; its last query is at its last key
#     padded  (1, 1, 2, 3 batch + 1)   starts of segments of queries and of keys, over all batch rows: per row the
#                                      padding before the sequence, the sequence, and the padding after it
#     packed  (1, 1, 1, segments + 1)  starts of packed sequences, the same for queries and keys
#     single  (1, 1, 1, 1)             whether no sequences are packed, which torch.compile knows only at run time
#
# Padding attends to padding. This costs time if there is much padding, but needs no gather or scatter. The results
# for padding are finite and unused.

NOT_CAUSAL = ("attention_mask", "attention that is not causal", "causal attention, with windows and padding")


def parallax_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **_: object,
) -> Tensor | None:
    """Make the mask described above; an entry of transformers' AttentionMaskInterface.

    q_length, q_offset    the number of new tokens, and the first one's position
    kv_length, kv_offset  the number of keys, and the first one's position
    mask_function         (batch, head, query, key) -> whether the query sees the key, by positions
    attention_mask        (batch, q_offset + q_length) bool, False for padding
    allow_is_causal_skip  False if None must not be returned, or mask_function may be more than causal
    use_vmap              True if the caller extended mask_function
    config                the model's config

    The layers handle windows. Waits for the device, as transformers' own masks do. Raises ArgumentError for attention
    that is not causal, for padding between tokens, and for an attention_mask of another length. Compiled code does not
    wait: there these checks are assertions on the device.
    """
    if use_vmap or not getattr(config, "is_causal", True):
        raise ArgumentError(*NOT_CAUSAL)
    if not torch.compiler.is_compiling():
        q_offset = int(q_offset)
    tokens = q_offset + q_length
    if attention_mask is not None:
        _check_length(attention_mask, tokens)
        return _mask_from_padding(attention_mask[:, kv_offset:], q_length, kv_length, allow_none=allow_is_causal_skip)
    if not allow_is_causal_skip and q_length == kv_length:  # packed sequences only occur without a cache
        return _packed_mask(mask_function, torch.arange(q_length, device=device), batch_size)
    if allow_is_causal_skip and not isinstance(tokens, Tensor) and tokens - kv_offset == kv_length:
        return None
    first = torch.zeros(batch_size, dtype=torch.int32, device=device)
    return _cached_mask(first, first + (tokens - kv_offset))


def key_range(mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Each sequence's first key and end in a cached mask, (batch,) int32 each; None for other masks."""
    return None if mask is None or mask.shape[0] == 1 else (mask[0, 0, 0], mask[1, 0, 0])


def cu_seqlens_of_mask(mask: Tensor, q_length: int, kv_length: int) -> tuple[Tensor, Tensor] | None:
    """cu_seqlens_q and cu_seqlens_k for parallax_attn_varlen_func, from a mask's segments. None for a single mask."""
    if mask.numel() == 1:
        allowed = "one sequence per row, or also cu_seq_lens_q and the like, under torch.compile"
        _require(mask.bool().all(), "position_ids", "packed sequences", allowed)
        return None
    keys = key_range(mask)
    starts = mask[0, 0] if keys is None else _segment_starts(*keys, keys[1] - q_length, q_length, kv_length)
    return starts[0], starts[-1]


def _check_length(attention_mask: Tensor, tokens: int | Tensor) -> None:
    length = attention_mask.shape[1]
    error = ("attention_mask", f"{length} columns", "one per token so far, in the cache and new")
    if isinstance(tokens, Tensor):
        _require(tokens == length, *error)
    elif length != tokens:
        raise ArgumentError(*error)


def _require(condition: Tensor, argument: str, got: str, allowed: str) -> None:
    """Raise ArgumentError if `condition` is false. Compiled code does not wait for the device, but asserts it there."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, f"{argument}: got {got}; allowed: {allowed}")
    elif not condition:
        raise ArgumentError(argument, got, allowed)


def _mask_from_padding(is_token: Tensor, q_length: int, kv_length: int, *, allow_none: bool) -> Tensor | None:
    """The mask for `parallax_mask`. is_token: (batch, keys so far), False for padding."""
    length = is_token.shape[1]
    tokens = is_token.sum(1)
    first = torch.where(tokens > 0, is_token.int().argmax(1), length)
    end = torch.where(tokens > 0, length - is_token.flip(1).int().argmax(1), length)
    conditions = torch.stack(((end - first == tokens).all(), (tokens != length).any(), (end != length).any()))
    any_padding = padding_after = True
    if not torch.compiler.is_compiling():
        conditions = conditions.cpu()  # the only wait for the device
        any_padding, padding_after = bool(conditions[1]), bool(conditions[2])
    allowed = "padding before or after them; with a cache only before them"
    _require(conditions[0], "attention_mask", "padding between tokens", allowed)
    if not any_padding and allow_none and length == kv_length:
        return None
    # A single new token is unaffected by padding after it: it is padding itself, or sees all other tokens.
    if q_length < kv_length and (q_length == 1 or not padding_after):
        return _cached_mask(first, end)
    return _segment_starts(first, end, length - q_length, q_length, kv_length)[None, None]


def _segment_starts(first: Tensor, end: Tensor, first_query: int | Tensor, q_length: int, kv_length: int) -> Tensor:
    """Starts of the segments of queries and of keys, (2, 3 batch + 1) int32.

    first, end   (batch,), the range of each sequence's keys
    first_query  the first query's index among the keys: an int, or (batch,)
    """
    keys = torch.stack((torch.zeros_like(first), first, end))
    queries = (keys - first_query).clamp(0, q_length)
    rows = torch.arange(len(first), device=first.device)
    starts = torch.stack((queries + rows * q_length, keys + rows * kv_length))
    totals = starts.new_tensor([[q_length], [kv_length]]) * len(first)
    return torch.cat((starts.transpose(1, 2).flatten(1), totals), dim=1).int()


def _packed_mask(mask_function: Callable[..., Tensor], positions: Tensor, batch: int) -> Tensor | None:
    """The mask of packed sequences. They begin at tokens that do not see the previous one. None if all do."""
    rows = torch.arange(batch, device=positions.device)[:, None]
    before, after = positions[None, :-1], positions[None, 1:]
    joined = mask_function(rows, torch.zeros_like(rows), after, before).expand(batch, -1)
    _require(~mask_function(rows, torch.zeros_like(rows), before, after).any(), *NOT_CAUSAL)
    if torch.compiler.is_compiling():
        return joined.all().int().view(1, 1, 1, 1)
    if joined.all():
        return None
    begins = torch.nn.functional.pad(~joined, (1, 0), value=True).flatten()
    return torch.cat((begins.nonzero()[:, 0], rows.new_tensor([begins.numel()]))).int()[None, None, None]


def _cached_mask(first: Tensor, end: Tensor) -> Tensor:
    return torch.stack((first, end)).int()[:, None, None]
