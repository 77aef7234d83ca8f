"""Inputs for the public functions, small enough for the fp64 reference on a CPU."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """q, r, k, v and, for packed sequences, the positional arguments after them."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    lengths: tuple[Tensor, Tensor, int, int] | tuple[()] = ()


def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


def inputs_of(
    rows: tuple[int, ...], keys: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaves that require gradients: 4 query heads and 2 kv heads of head_dim 16."""
    q, r = normal(*rows, 4, 16, dtype=dtype), normal(*rows, 5, 16, dtype=dtype)[..., 1:, :].contiguous() / 4
    k, v = normal(*keys, 2, 16, dtype=dtype), normal(*keys, 3, 16, dtype=dtype)[..., 1:, :].contiguous()
    q, r, k, v = (x.requires_grad_() for x in (q, r, k, v))
    return q, r, k, v


def dense(seqlen_q: int = 5, seqlen_kv: int = 7, dtype: torch.dtype = torch.float32) -> Sample:
    """A dense batch of two sequences."""
    return Sample(inputs_of((2, seqlen_q), (2, seqlen_kv), dtype))


def packed(dtype: torch.dtype = torch.float32) -> Sample:
    """Five packed sequences; one has no queries, one no keys, one neither."""
    starts_q = torch.tensor([0, 2, 2, 2, 4, 9], dtype=torch.int32)
    starts_k = torch.tensor([0, 3, 4, 4, 4, 11], dtype=torch.int32)
    return Sample(inputs_of((9,), (11,), dtype), (starts_q, starts_k, 5, 7))


def padded(dtype: torch.dtype = torch.float32) -> Sample:
    """`packed` with padding rows of NaN before and after: 1 and 12 for q and r, 2 and 9 for k and v."""
    inputs, (starts_q, starts_k, *longest) = packed(dtype)
    padding = ((1, 12), (1, 12), (2, 9), (2, 9))
    wider = (
        torch.nn.functional.pad(x.detach(), (0, 0, 0, 0, *sides), value=torch.nan)
        for x, sides in zip(inputs, padding, strict=True)
    )
    q, r, k, v = (x.requires_grad_() for x in wider)
    return Sample((q, r, k, v), (starts_q + 1, starts_k + 2, *longest))


def formula(
    q: Tensor, r: Tensor, k: Tensor, v: Tensor, *starts: Tensor, causal: bool = False, window_size: int | None = None
) -> Tensor:
    """out in float64 by a direct formula, which torch can differentiate, independent of the package's oracle.

    starts  cu_seqlens_q and cu_seqlens_k of packed sequences
    """
    if starts:
        # torch 2.9 has no Tensor.tolist under a transform.
        ends = zip(*(pairwise(map(int, x)) for x in starts), strict=True)
        parts = [(slice(*rows), slice(*keys)) for rows, keys in ends]
        result = [
            formula(q[rows][None], r[rows][None], k[keys][None], v[keys][None], causal=causal, window_size=window_size)
            for rows, keys in parts
        ]
        rest = q[starts[0][-1] :].double() * 0
        return torch.cat([*(x[0] for x in result), rest])
    q, r, k, v = (x.double() for x in (q, r, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    position = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1])
    visible = (key <= position) if causal else (key >= 0).expand(q.shape[1], -1)
    visible = visible & (key > position - window_size) if window_size else visible
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(q.shape[-1] ** -0.5).exp() * visible
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    t = torch.einsum("bqhd,bkhd->bhqk", r, k)
    return torch.einsum("bhqk,bkhd->bqhd", weights * (1 + (weights * t).sum(-1, keepdim=True) - t), v)


def plain_attention(
    q: Tensor, r: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, softcap: float | None = None
) -> Tensor:
    """Attention of (batch, seqlen, heads, head_dim) by the formula, in float64; autograd gives its gradients."""
    group = q.shape[2] // k.shape[2]
    q, r, k, v = (x.double().transpose(1, 2) for x in (q, r, k, v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    s = q @ k.mT / q.shape[-1] ** 0.5
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(s.shape[-1] - s.shape[-2] + 1), -torch.inf)
    p, t = s.softmax(-1), r @ k.mT
    return ((p * (1 + (p * t).sum(-1, keepdim=True) - t)) @ v).transpose(1, 2)
