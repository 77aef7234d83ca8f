"""Parallax attention as an entry of transformers' AttentionInterface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.functional import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.runtime.kvcache import parallax_attn_with_kvcache
from parallax_gen.runtime.transforms import records_gradients, under_a_transform

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
        return found, None
    if lengths is None and attention_mask is not None:
        starts = starts_of(attention_mask, q_length, kv_length)
        lengths = starts and (*starts, q_length, kv_length)
    if lengths is None:
        return parallax_attn_func(q, r, k, v, **options), None
    q, r, k, v = (x.flatten(0, 1) for x in (q, r, k, v))
    out = parallax_attn_varlen_func(q, r, k, v, *lengths, **options)
    return out.unflatten(0, (-1, q_length)), None


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


# -- transformers' masks as our functions take them: where each sequence's keys begin and end, not a square of booleans.
#
# A mask is None, where every query sees all keys up to its own, or an int32 tensor. transformers leaves it alone on its
# way to the layers because it has four dimensions; which of them is long says what it is:
#
#     cached  (2, 1, 1, batch)        each sequence's first key, and its end; its last query is at its last key
#     padded  (1, 1, 2, 3 batch + 1)  where runs of queries and of keys begin, in all sequences one after the other:
#                                     what lies before a sequence, the sequence, and what lies behind it, each a run
#     packed  (1, 1, 1, runs + 1)     where packed sequences begin, their queries as well as their keys
#     single  (1, 1, 1, 1)            whether nothing is packed, which torch.compile does not know before it runs
#
# So padding attends to padding: that takes time where there is much of it, and spares all gathering and scattering.
# Its results are finite, and nobody's.

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
    """The mask that this module's docstring describes: an entry of transformers' AttentionMaskInterface.

    q_length, q_offset    of the new tokens, and the first one's place in its sequence
    kv_length, kv_offset  of the keys, and the first one's place
    mask_function         (batch, head, query, key) -> whether it sees that, by their places
    attention_mask        (batch, q_offset + q_length) bool, False where there is padding
    allow_is_causal_skip  False where None will not do, or mask_function may be more than causal
    use_vmap              True where the caller has added to mask_function
    config                the model's

    Windows are the layers' own matter. Waits for the device, as transformers' own masks do. Raises ArgumentError for
    attention that is not causal, for padding between tokens, and for an attention_mask of another length. What
    torch.compile makes of it does not wait: there these are assertions on the device.
    """
    if use_vmap or not getattr(config, "is_causal", True):
        raise ArgumentError(*NOT_CAUSAL)
    if not torch.compiler.is_compiling():
        q_offset = int(q_offset)
    tokens = q_offset + q_length
    if attention_mask is not None:
        _check_length(attention_mask, tokens)
        return _of_padding(attention_mask[:, kv_offset:], q_length, kv_length, allow_none=allow_is_causal_skip)
    if not allow_is_causal_skip and q_length == kv_length:  # packed sequences are looked for where there is no cache
        return _packed(mask_function, torch.arange(q_length, device=device), batch_size)
    if allow_is_causal_skip and not isinstance(tokens, Tensor) and tokens - kv_offset == kv_length:
        return None
    first = torch.zeros(batch_size, dtype=torch.int32, device=device)
    return _cached(first, first + (tokens - kv_offset))


def keys_of(mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Of a cached mask each sequence's first key, and its end, (batch,) int32 each; None of any other."""
    return None if mask is None or mask.shape[0] == 1 else (mask[0, 0, 0], mask[1, 0, 0])


def starts_of(mask: Tensor, q_length: int, kv_length: int) -> tuple[Tensor, Tensor] | None:
    """Where runs of queries begin, and runs of keys: cu_seqlens_q and cu_seqlens_k of parallax_attn_varlen_func.

    None of a single mask.
    """
    if mask.numel() == 1:
        allowed = "one sequence a row, or cu_seq_lens_q and the like beside them, under torch.compile"
        _require(mask.bool().all(), "position_ids", "packed sequences", allowed)
        return None
    keys = keys_of(mask)
    starts = mask[0, 0] if keys is None else _runs(*keys, keys[1] - q_length, q_length, kv_length)
    return starts[0], starts[-1]


def _check_length(attention_mask: Tensor, tokens: int | Tensor) -> None:
    length = attention_mask.shape[1]
    told = ("attention_mask", f"{length} columns", "one for each token so far, those in the cache and the new ones")
    if isinstance(tokens, Tensor):
        _require(tokens == length, *told)
    elif length != tokens:
        raise ArgumentError(*told)


def _require(fact: Tensor, argument: str, got: str, allowed: str) -> None:
    """ArgumentError if it is not so; what torch.compile makes does not wait for the device, and asserts it there."""
    if torch.compiler.is_compiling():
        torch._assert_async(fact, f"{argument}: got {got}; allowed: {allowed}")
    elif not fact:
        raise ArgumentError(argument, got, allowed)


def _of_padding(seen: Tensor, q_length: int, kv_length: int, *, allow_none: bool) -> Tensor | None:
    """seen  (batch, keys so far), False where there is padding"""
    length = seen.shape[1]
    tokens = seen.sum(1)
    first = torch.where(tokens > 0, seen.int().argmax(1), length)
    end = torch.where(tokens > 0, length - seen.flip(1).int().argmax(1), length)
    facts = torch.stack(((end - first == tokens).all(), (tokens != length).any(), (end != length).any()))
    padded = behind = True
    if not torch.compiler.is_compiling():
        facts = facts.cpu()  # the one wait
        padded, behind = bool(facts[1]), bool(facts[2])
    allowed = "padding before or behind them; before, to go on from a cache"
    _require(facts[0], "attention_mask", "padding between tokens", allowed)
    if not padded and allow_none and length == kv_length:
        return None
    # One new token needs no care for padding behind: it is padding itself, or sees all that is not.
    if q_length < kv_length and (q_length == 1 or not behind):
        return _cached(first, end)
    return _runs(first, end, length - q_length, q_length, kv_length)[None, None]


def _runs(first: Tensor, end: Tensor, place: int | Tensor, q_length: int, kv_length: int) -> Tensor:
    """(2, 3 batch + 1) int32, of queries and of keys.

    first, end  (batch,), each sequence's keys
    place       of the first query among the keys: an int, or (batch,)
    """
    keys = torch.stack((torch.zeros_like(first), first, end))
    queries = (keys - place).clamp(0, q_length)
    rows = torch.arange(len(first), device=first.device)
    starts = torch.stack((queries + rows * q_length, keys + rows * kv_length))
    totals = starts.new_tensor([[q_length], [kv_length]]) * len(first)
    return torch.cat((starts.transpose(1, 2).flatten(1), totals), dim=1).int()


def _packed(mask_function: Callable[..., Tensor], places: Tensor, batch: int) -> Tensor | None:
    """A sequence begins at each token that does not see the one before it. None where all see it."""
    rows = torch.arange(batch, device=places.device)[:, None]
    before, after = places[None, :-1], places[None, 1:]
    joined = mask_function(rows, torch.zeros_like(rows), after, before).expand(batch, -1)
    _require(~mask_function(rows, torch.zeros_like(rows), before, after).any(), *NOT_CAUSAL)
    if torch.compiler.is_compiling():
        return joined.all().int().view(1, 1, 1, 1)
    if joined.all():
        return None
    begins = torch.nn.functional.pad(~joined, (1, 0), value=True).flatten()
    return torch.cat((begins.nonzero()[:, 0], rows.new_tensor([begins.numel()]))).int()[None, None, None]


def _cached(first: Tensor, end: Tensor) -> Tensor:
    return torch.stack((first, end)).int()[:, None, None]
