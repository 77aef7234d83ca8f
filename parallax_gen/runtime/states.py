"""Attention over some of the keys, and joining what was found over different ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.transforms import needs_gradients, under_a_transform


class State(NamedTuple):
    """What attention over some of the keys finds: all that is needed to join it with that over others.

    It is what `parallax_attn_func(..., return_stats=True)` and `parallax_attn_varlen_func` return, in that order.

    out     (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) packed
    lse     (batch, heads, seqlen_q), or (heads, total_q): log Σ exp(scale·q·k); -inf of a query that sees none
    t_mean  like lse: t̄
    v_mean  like out: v̄, which is softmax attention
    """

    out: Tensor
    lse: Tensor
    t_mean: Tensor
    v_mean: Tensor


def merge_states(*states: State | tuple[Tensor, Tensor, Tensor, Tensor]) -> State:
    """Attention over the keys of all states together, from attention over each one's.

    states  one or more, as `State` says, of the same queries and of keys that no two share: of a common prefix and of
            what follows it, say, or of one sequence's keys on different GPUs

    With w_i = exp(lse_i - lse):  lse = log Σ exp(lse_i),  t̄ = Σ w_i t̄_i,  v̄ = Σ w_i v̄_i, and

        out = Σ w_i (out_i + (t̄ - t̄_i) v̄_i),

    since out_i = v̄_i (1 + t̄_i) - Σ_j p_ij t_ij v_j. The sums are in fp32; out and v̄ come back in the dtypes of the
    first state's. There are no gradients by way of states that our functions return, whose
    lse, t̄ and v̄ have none: one whose out needs gradients is refused. Raises ArgumentError.
    """
    if not states:
        raise ArgumentError("states", "none", "one state or more")
    parts = [State(*state) for state in states]
    first = parts[0]
    _check(parts)
    total = State(*(x.to(torch.float32, copy=True) for x in first))
    for part in parts[1:]:
        if under_a_transform():  # vmap writes samples in place only to what has samples itself
            total = State(*(x + torch.zeros_like(y) for x, y in zip(total, part, strict=True)))
        absorb(total, part)
    return total._replace(out=total.out.to(first.out.dtype), v_mean=total.v_mean.to(first.v_mean.dtype))


def absorb(total: State, part: State) -> None:
    """Join a part into `total`, in place: all of it fp32, any strides.

    Of two weights that add up to 1 the formula of `merge_states` is
    out = (1 - w) out_1 + w out_2 + w (1 - w) (t̄_2 - t̄_1) (v̄_1 - v̄_2).
    """
    lse = torch.logaddexp(total.lse, part.lse)
    # A query that saw no key in either has the weight exp(-inf - -inf): 0, as its out is.
    weight = (part.lse - lse.masked_fill(lse.isneginf(), 0.0)).exp()
    of_rows, apart = _of_rows(weight), _of_rows(weight * (1 - weight) * (part.t_mean - total.t_mean))
    v_mean = part.v_mean.float()
    total.out.lerp_(part.out.float(), of_rows).addcmul_(apart, total.v_mean - v_mean)
    total.v_mean.lerp_(v_mean, of_rows)
    total.t_mean.lerp_(part.t_mean, weight)
    total.lse.copy_(lse)


def _of_rows(x: Tensor) -> Tensor:
    """Numbers of (heads, queries) beside rows of (queries, heads, head_dim)."""
    return x.transpose(-1, -2)[..., None]


def _check(parts: list[State]) -> None:
    first = parts[0]
    if not all(isinstance(x, Tensor) for part in parts for x in part):
        raise ArgumentError("states", "one of something else than tensors", "(out, lse, t_mean, v_mean) each")
    rows = (*first.out.shape[:-3], first.out.shape[-2], first.out.shape[-3]) if first.out.dim() > 2 else None
    for i, part in enumerate(parts):
        if torch.is_grad_enabled() and needs_gradients(part.out) and not needs_gradients(part.lse):
            allowed = "one without, or no_grad: its lse, t̄ and v̄ have none, which out alone would get wrong"
            raise ArgumentError(f"states[{i}]", "an out that needs gradients", allowed)
        if part.out.shape != first.out.shape or part.v_mean.shape != first.out.shape:
            got = f"out {tuple(part.out.shape)} and v_mean {tuple(part.v_mean.shape)}"
            raise ArgumentError(f"states[{i}]", got, f"{tuple(first.out.shape)} of both, as states[0] has")
        if part.lse.shape != rows or part.t_mean.shape != rows:
            got = f"lse {tuple(part.lse.shape)} and t_mean {tuple(part.t_mean.shape)}"
            raise ArgumentError(f"states[{i}]", got, f"{rows} of both, to go with out {tuple(part.out.shape)}")
