"""Parallax attention as the other packages document it, in fp64 with full score matrices and a mask."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from assertions import assert_close
from torch import Tensor

from parallax_gen.oracle.accuracy import gradient_term_sizes


def expected_of_each(
    q: Tensor, r: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, visible: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over (batch, seqlen, heads, head_dim): out, and Σ exp(scale·q·k), t̄ and v̄; differentiable.

    visible  (seqlen_q, seqlen_kv) or (batch, 1, seqlen_q, seqlen_kv); a query that sees nothing gives 0
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, r, k, v = (x.double().transpose(1, 2) for x in (q, r, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    p1 = (scale * q @ k.mT).exp()
    if visible is not None:
        p1 = p1 * visible
    p2 = p1 * (r @ k.mT)
    d1, d2 = p1.sum(-1, keepdim=True), p2.sum(-1, keepdim=True)
    whole = torch.where(d1 == 0, 1.0, d1)
    o1, o2 = p1 @ v / whole, p2 @ v / whole
    out = o1 * (1 + d2 / whole) - o2
    return out.transpose(1, 2), d1[..., 0], (d2 / whole)[..., 0], o1.transpose(1, 2)


def causal(seqlen_q: int, seqlen_kv: int, window: int = -1, *, at_end: bool) -> Tensor:
    """The mask of keys [i - window + 1, i], where i is the query's row; at_end: the last query is at the last key."""
    row = torch.arange(seqlen_q)[:, None] + (seqlen_kv - seqlen_q if at_end else 0)
    key = torch.arange(seqlen_kv)
    return (key <= row) & ((key >= row - window + 1) | (window < 0))


def packed(q: Tensor, r: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], window: int = -1) -> Tensor:
    """Packed sequences, as a batch of 1."""
    parts = []
    for begin, end in pairwise(starts):
        rows = (x[:, begin:end] for x in (q, r, k, v))
        parts.append(expected_of_each(*rows, visible=causal(end - begin, end - begin, window, at_end=True))[0])
    return torch.cat(parts, 1)


def normal(*size: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*size)).to(dtype)


def check_gradients(result: Tensor, expected: Tensor, inputs: Sequence[Tensor], name: str) -> None:
    """Compare the gradients of both outputs with respect to the inputs, for a random output gradient."""
    do = torch.randn_like(result)
    target = torch.autograd.grad(expected, inputs, do.double(), retain_graph=True)
    sizes = gradient_term_sizes(*[x.detach() for x in inputs], do)
    for x, grad, want, size in zip(inputs, torch.autograd.grad(result, inputs, do), target, sizes, strict=True):
        assert grad.dtype == x.dtype
        assert_close(grad, want.double(), name, float(size))
