"""The oracle's forward derivative: what `out` changes by where the inputs change, in float64, from its formula.

With the reference's scores s and t, its weights p and its mean t̄, and δ for a change:

    δs = scale (δq·k + q·δk)            δt = δr·k + r·δk
    δp = p (δs − Σ p δs)                δt̄ = Σ (δp t + p δt)
    w = p (1 + t̄ − t)                   δw = δp (1 + t̄ − t) + p (δt̄ − δt)
    δo = Σ (δw v + w δv)

Masked pairs have p = 0, and so δp = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from parallax_gen.problem.reference import Block, Inputs, blocks, check_shapes, masked_scores, sequences_of

Tangents = Sequence[Tensor | None]  # of q, r, k and v, each like its input; None for one that does not change


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
) -> Tensor:
    """The tangent of `reference_forward`'s out, like q, in float64: δo. The rest as of `reference_forward`.

    Block by block, in a few times its memory. Nothing is written in place: torch.func.linearize traces this, and takes
    a tensor that is made here for a constant.
    """
    _, seqlen_q, heads, _ = check_shapes(q, r, k, v)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    inputs = Inputs(q, r, k, v)
    # A tangent that is not there is a zero that takes no memory.
    changes = Inputs(
        *(x.new_zeros(()).expand(x.shape) if d is None else d for x, d in zip(inputs, tangents, strict=True))
    )
    found = []
    for b in range(q.shape[0]):
        of_blocks = [
            _tangent_of_rows(_of_block(inputs, b, block), _of_block(changes, b, block), scale, block)
            for block in blocks(heads // k.shape[2], k.shape[2], seqlen_q, k.shape[1], causal, window_size)
        ]
        found.append(_joined(of_blocks, q[b], k.shape[2]))
    return torch.stack(found) if found else q.new_zeros(q.shape, dtype=torch.float64)


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
) -> Tensor:
    """`reference_tangent` of packed sequences: shapes as of `reference_varlen_forward`. 0 in rows of no sequence."""
    found, places = [torch.zeros_like(q[:0], dtype=torch.float64)], [torch.arange(0, device=q.device)]
    for rows, keys in sequences_of(cu_seqlens_q, cu_seqlens_k):
        of_sequence = reference_tangent(
            q[rows][None], r[rows][None], k[keys][None], v[keys][None],
            [None if d is None else d[at][None] for d, at in zip(tangents, (rows, rows, keys, keys), strict=True)],
            causal=causal, window_size=window_size, softmax_scale=softmax_scale,
        )[0]  # fmt: skip
        found.append(of_sequence)
        places.append(torch.arange(rows.start, rows.start + len(of_sequence), device=q.device))
    everything = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    return everything.index_copy(0, torch.cat(places), torch.cat(found))


def _of_block(x: Inputs, b: int, block: Block) -> Inputs:
    """A block's queries and probes (rows, group, head_dim), keys and values (length, head_dim), in float64."""
    rows, keys = (block.rows, block.of_group), (slice(None), block.kv_head)
    return Inputs(x.q[b][rows].double(), x.r[b][rows].double(), x.k[b][keys].double(), x.v[b][keys].double())


def _joined(of_blocks: Sequence[Tensor], q: Tensor, kv_heads: int) -> Tensor:
    """One sequence's (seqlen_q, heads, head_dim), from what was found of each kv head's blocks, in their order."""
    if not of_blocks:
        return q.new_zeros(q.shape, dtype=torch.float64)
    each = len(of_blocks) // kv_heads
    return torch.cat([torch.cat(list(of_blocks[i : i + each])) for i in range(0, len(of_blocks), each)], dim=1)


def _tangent_of_rows(x: Inputs, change: Inputs, scale: float, block: Block) -> Tensor:
    """δo of a block."""
    s, t, sees_any = masked_scores(x.q, x.r, x.k, scale, block)
    p = s.softmax(dim=-1) * sees_any
    ds = scale * (change.q.transpose(0, 1) @ x.k.T + x.q.transpose(0, 1) @ change.k.T)
    dt = change.r.transpose(0, 1) @ x.k.T + x.r.transpose(0, 1) @ change.k.T
    dp = p * (ds - (p * ds).sum(dim=-1, keepdim=True))
    u = 1 + (p * t).sum(dim=-1, keepdim=True) - t
    dw = dp * u + p * ((dp * t + p * dt).sum(dim=-1, keepdim=True) - dt)
    return (dw @ x.v + (p * u) @ change.v).transpose(0, 1)
