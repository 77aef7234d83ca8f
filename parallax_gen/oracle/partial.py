"""Gradients over some of the keys, for ring attention on a CPU; forward-mode derivatives of the oracle. In float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parallax_gen.oracle.reference import (
    Block,
    Gradients,
    blocks,
    capped,
    check_shapes,
    dot_products,
    masked_scores,
    sequences_of,
    weighted_sums,
)
from parallax_gen.problem.work import scale_or_default


def partial_backward(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    out: Tensor,
    lse: Tensor,
    t_mean: Tensor,
    v_mean: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> Gradients:
    """The contribution of these keys to the gradients, given the result of attention over all keys.

    q, r, do, out, v_mean  (batch, seqlen_q, heads, head_dim)
    k, v                   (batch, seqlen_kv, kv_heads, head_dim)
    lse, t_mean            (batch, heads, seqlen_q)
    causal                 aligned to the end of these keys

    With p = exp(s - lse), dp = do·v, dp_mean = do·v_mean and delta = do·out:  dt = p (dp_mean - dp) is the gradient of
    t, and ds = p (dp - delta) - (t_mean - t) dt that of s, which a softcap c multiplies by 1 - (s / c)^2. The gradients
    of q, r and k are products of ds and dt with q, r and k; dv is the sum of p (1 + t_mean - t) do. All scores are in
    memory at once: this function is for sizes as in tests.
    """
    heads, kv_heads, head_dim = q.shape[2], k.shape[2], q.shape[3]
    scale = scale_or_default(softmax_scale, head_dim)
    q, r, do, out, v_mean, k, v = (x.double().transpose(1, 2) for x in (q, r, do, out, v_mean, k, v))
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    s, t, dp = capped(scale * q @ k.mT, softcap), r @ k.mT, do @ v.mT  # (batch, heads, queries, keys)
    sees_any = ~lse.isneginf()
    p = (s - lse.double().masked_fill(~sees_any, 0.0)[..., None]).exp() * sees_any[..., None]
    if causal:
        queries, keys = s.shape[-2:]
        p = p.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(keys - queries + 1), 0.0)
    w = 1 + t_mean.double()[..., None] - t
    dp_mean, delta = (do * v_mean).sum(-1, keepdim=True), (do * out).sum(-1, keepdim=True)
    dt = p * (dp_mean - dp)
    ds = p * (dp - delta) - (w - 1) * dt
    ds = ds * softcap_slope(s, softcap)
    dk = scale * ds.mT @ q + dt.mT @ r
    dv = (p * w).mT @ do
    dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))
    return Gradients(*(x.transpose(1, 2) for x in (scale * ds @ k, dt @ k, dk, dv)))


def softcap_slope(s: Tensor, softcap: float | None) -> Tensor | float:
    """The derivative of capped scores s = c tanh(x / c) with respect to x: 1 - (s / c)^2."""
    return 1.0 if softcap is None else 1 - (s / softcap).square()


# -- The forward-mode derivative of the oracle: the change of `out` for a change of the inputs, in float64.
#
# With the reference's scores s and t, its weights p and its mean t̄, and δ for a change:
#
#     δs = scale (δq·k + q·δk)            δt = δr·k + r·δk        (δs times 1 − (s/c)² under a softcap c)
#     δp = p (δs − Σ p δs)                δt̄ = Σ (δp t + p δt)
#     w = p (1 + t̄ − t)                   δw = δp (1 + t̄ − t) + p (δt̄ − δt)
#     δo = Σ (δw v + w δv)
#
# Masked pairs have p = 0 and therefore δp = 0.

Tangents = Sequence["Tensor | None"]  # of q, r, k and v, each like its input; None for no change


def reference_tangent(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    tangents: Tangents,
    *,
    causal: bool = False,
    window_size: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The tangent of `reference_forward`'s out, like q, in float64: δo. Other arguments as in `reference_forward`.

    Computed block by block, in a few times the forward's memory. Nothing is written in place: torch.func.linearize
    traces this function, and would treat a tensor that is created here as a constant.
    """
    _, seqlen_q, heads, _ = check_shapes(q, r, k, v)
    scale = scale_or_default(softmax_scale, q.shape[-1])
    inputs = _Tensors(q, r, k, v)
    # A missing tangent is an expanded zero, which takes no memory.
    changes = _Tensors(
        *(x.new_zeros(()).expand(x.shape) if d is None else d for x, d in zip(inputs, tangents, strict=True))
    )
    result = []
    for b in range(q.shape[0]):
        parts_of_heads: dict[int, list[Tensor]] = {}
        for block in blocks(heads // k.shape[2], k.shape[2], seqlen_q, k.shape[1], causal, window_size, softcap):
            part = _tangent_of_block(_of_block(inputs, b, block), _of_block(changes, b, block), scale, block)
            parts_of_heads.setdefault(block.heads.start, []).append(part)
        by_heads = [torch.cat(parts) for parts in parts_of_heads.values()]
        result.append(torch.cat(by_heads, dim=1) if by_heads else q.new_zeros(q.shape[1:], dtype=torch.float64))
    return torch.stack(result) if result else q.new_zeros(q.shape, dtype=torch.float64)


def reference_varlen_tangent(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    tangents: Tangents,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    *,
    causal: bool = False,
    window_size: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`reference_tangent` of packed sequences: shapes as in `reference_varlen_forward`. 0 in rows of no sequence."""
    parts, row_numbers = [torch.zeros_like(q[:0], dtype=torch.float64)], [torch.arange(0, device=q.device)]
    for rows, keys in sequences_of(cu_seqlens_q, cu_seqlens_k):
        part = reference_tangent(
            q[rows][None], r[rows][None], k[keys][None], v[keys][None],
            [None if d is None else d[part_rows][None] for d, part_rows in zip(tangents, (rows, rows, keys, keys),
            strict=True)],
            causal=causal, window_size=window_size, softmax_scale=softmax_scale, softcap=softcap,
        )[0]  # fmt: skip
        parts.append(part)
        row_numbers.append(torch.arange(rows.start, rows.start + len(part), device=q.device))
    result = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    return result.index_copy(0, torch.cat(row_numbers), torch.cat(parts))


class _Tensors(NamedTuple):
    """The inputs of a call, or their tangents."""

    q: Tensor
    r: Tensor
    k: Tensor
    v: Tensor


def _of_block(x: _Tensors, b: int, block: Block) -> _Tensors:
    """The inputs of a block, in float64: q and r (rows, heads, head_dim), k and v (length, kv_heads, head_dim)."""
    rows, keys = (block.rows, block.heads), (slice(None), block.kv_heads)
    return _Tensors(x.q[b][rows].double(), x.r[b][rows].double(), x.k[b][keys].double(), x.v[b][keys].double())


def _tangent_of_block(x: _Tensors, change: _Tensors, scale: float, block: Block) -> Tensor:
    """The tangent δo of a block."""
    s, t, sees_any = masked_scores(x.q, x.r, x.k, scale, block)
    p = s.softmax(dim=-1) * sees_any
    s_tangent = scale * (dot_products(change.q, x.k) + dot_products(x.q, change.k))
    s_tangent = s_tangent * softcap_slope(s.masked_fill(p == 0, 0.0), block.softcap)
    t_tangent = dot_products(change.r, x.k) + dot_products(x.r, change.k)
    p_tangent = p * (s_tangent - (p * s_tangent).sum(dim=-1, keepdim=True))
    factor = 1 + (p * t).sum(dim=-1, keepdim=True) - t
    t_mean_tangent = (p_tangent * t + p * t_tangent).sum(dim=-1, keepdim=True)
    w_tangent = p_tangent * factor + p * (t_mean_tangent - t_tangent)
    return weighted_sums(w_tangent, x.v) + weighted_sums(p * factor, change.v)
