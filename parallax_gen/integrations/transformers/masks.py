"""transformers' masks as our functions take them: where each sequence's keys begin and end, not a square of booleans.

A mask is None, where every query sees all keys up to its own, or an int32 tensor. transformers leaves it alone on its
way to the layers because it has four dimensions; which of them is long says what it is:

    cached  (2, 1, 1, batch)        each sequence's first key, and its end; its last query is at its last key
    padded  (1, 1, 2, 3 batch + 1)  where runs of queries and of keys begin, in all sequences one after the other: what
                                    lies before a sequence, the sequence, and what lies behind it, each a run by itself
    packed  (1, 1, 1, runs + 1)     where packed sequences begin, their queries as well as their keys
    single  (1, 1, 1, 1)            whether nothing is packed, which torch.compile does not know before it runs

Padding attends to padding so: that takes time where there is much of it, and spares all gathering and scattering. Its
results are finite, and nobody's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError

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
