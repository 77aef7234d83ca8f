"""Gradients over some of the keys, in float64: what ring attention adds up where there is no GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parallax_gen.problem.reference import Gradients


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
) -> Gradients:
    """What these keys add to the gradients, given what attention over all keys, of which they are some, has found.

    q, r, do, out, v_mean  (batch, seqlen_q, heads, head_dim)
    k, v                   (batch, seqlen_kv, kv_heads, head_dim)
    lse, t_mean            (batch, heads, seqlen_q)
    causal                 aligned to the end of these keys

    With p = exp(s - lse), a = do·v, b = do·v_mean and T = do·out:  gt = p (b - a) is the gradient of t, and
    gs = p (a - T) - (t_mean - t) gt that of s; the rest are their products with q, r and k, and dv is the sum of
    p (1 + t_mean - t) do. Whole scores at a time: for sizes that tests have.
    """
    heads, kv_heads, head_dim = q.shape[2], k.shape[2], q.shape[3]
    scale = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    q, r, do, out, v_mean, k, v = (x.double().transpose(1, 2) for x in (q, r, do, out, v_mean, k, v))
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    s, t, a = scale * q @ k.mT, r @ k.mT, do @ v.mT  # (batch, heads, queries, keys)
    seen = ~lse.isneginf()
    p = (s - lse.double().masked_fill(~seen, 0.0)[..., None]).exp() * seen[..., None]
    if causal:
        queries, keys = s.shape[-2:]
        p = p.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(keys - queries + 1), 0.0)
    w = 1 + t_mean.double()[..., None] - t
    gt = p * ((do * v_mean).sum(-1, keepdim=True) - a)
    gs = p * (a - (do * out).sum(-1, keepdim=True)) - (w - 1) * gt
    dk = scale * gs.mT @ q + gt.mT @ r
    dv = (p * w).mT @ do
    dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))
    return Gradients(*(x.transpose(1, 2) for x in (scale * gs @ k, gt @ k, dk, dv)))
