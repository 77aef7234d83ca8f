"""The state of attention over some of the keys, and merging states over disjoint keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.transforms import needs_gradients, transform_is_active


class State(NamedTuple):
    """The result of attention over some of the keys, with everything needed to merge it with states over other keys.

    `parallax_attn_func(..., return_stats=True)` and `parallax_attn_varlen_func` return these tensors in this order.

    out     (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) packed
    lse     (batch, heads, seqlen_q), or (heads, total_q): log Σ exp(s) of (capped) scores s; -inf for a query that
            sees no key
    t_mean  like lse: t̄
    v_mean  like out: v̄, the output of softmax attention
    """

    out: Tensor
    lse: Tensor
    t_mean: Tensor
    v_mean: Tensor


def merge_states(*states: State | tuple[Tensor, Tensor, Tensor, Tensor]) -> State:
    """Merge states over disjoint keys into the state over all of these keys.

    states  one or more, of the same queries and of disjoint keys: for example a shared prefix and each suffix, or parts
            of one sequence on different GPUs

    With w_i = exp(lse_i - lse):  lse = log Σ exp(lse_i),  t̄ = Σ w_i t̄_i,  v̄ = Σ w_i v̄_i, and

        out = Σ w_i (out_i + (t̄ - t̄_i) v̄_i),

    since out_i = v̄_i (1 + t̄_i) - Σ_j p_ij t_ij v_j. The sums are in fp32, in the order of `states`, on which the last
    bits depend; out and v̄ are returned in the first state's dtypes. The lse, t̄ and v̄ that our functions return have
    no gradients, so a state whose out needs gradients is refused. Raises ArgumentError.
    """
    if not states:
        raise ArgumentError("states", "none", "one state or more")
    parts = [State(*state) for state in states]
    first = parts[0]
    _check(parts)
    total = State(*(x.to(torch.float32, copy=True) for x in first))
    for part in parts[1:]:
        if transform_is_active():  # vmap allows in-place writes of samples only into batched tensors
            total = State(*(x + torch.zeros_like(y) for x, y in zip(total, part, strict=True)))
        merge_into(total, part)
    return total._replace(out=total.out.to(first.out.dtype), v_mean=total.v_mean.to(first.v_mean.dtype))


def merge_into(total: State, part: State) -> None:
    """Merge `part` into `total` in place. `total` is fp32, of any strides.

    For two weights that add up to 1 the formula of `merge_states` is
    out = (1 - w) out_1 + w out_2 + w (1 - w) (t̄_2 - t̄_1) (v̄_1 - v̄_2).
    """
    lse = torch.logaddexp(total.lse, part.lse)
    # Where neither state saw a key the weight would be exp(-inf - -inf) = NaN; here it is 0.
    weight = (part.lse - lse.masked_fill(lse.isneginf(), 0.0)).exp()
    row_weight, cross = _per_row(weight), _per_row(weight * (1 - weight) * (part.t_mean - total.t_mean))
    v_mean = part.v_mean.float()
    total.out.lerp_(part.out.float(), row_weight).addcmul_(cross, total.v_mean - v_mean)
    total.v_mean.lerp_(v_mean, row_weight)
    total.t_mean.lerp_(part.t_mean, weight)
    total.lse.copy_(lse)


def _per_row(x: Tensor) -> Tensor:
    """(..., heads, queries) as (..., queries, heads, 1), to broadcast over (..., queries, heads, head_dim)."""
    return x.transpose(-1, -2)[..., None]


def _check(parts: list[State]) -> None:
    first = parts[0]
    if not all(isinstance(x, Tensor) for part in parts for x in part):
        raise ArgumentError(
            "states",
            "a state that does not hold tensors",
            "states that are tuples (out, lse, t_mean, v_mean) of tensors",
        )
    stats_shape = (*first.out.shape[:-3], first.out.shape[-2], first.out.shape[-3]) if first.out.dim() > 2 else None
    for i, part in enumerate(parts):
        if torch.is_grad_enabled() and needs_gradients(part.out) and not needs_gradients(part.lse):
            allowed = (
                "an out without gradients, or torch.no_grad(): lse, t̄ and v̄ have none, so those of out would be wrong"
            )
            raise ArgumentError(f"states[{i}]", "an out that needs gradients", allowed)
        if part.out.shape != first.out.shape or part.v_mean.shape != first.out.shape:
            got = f"out {tuple(part.out.shape)} and v_mean {tuple(part.v_mean.shape)}"
            raise ArgumentError(f"states[{i}]", got, f"{tuple(first.out.shape)} for both, as states[0] has")
        if part.lse.shape != stats_shape or part.t_mean.shape != stats_shape:
            got = f"lse {tuple(part.lse.shape)} and t_mean {tuple(part.t_mean.shape)}"
            raise ArgumentError(f"states[{i}]", got, f"{stats_shape} for both, to match out {tuple(part.out.shape)}")
