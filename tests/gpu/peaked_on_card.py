"""Peaked rows on a card: their inputs, softmax attention with a kernel's roundings, and bounds of the forward's errors.

tests/codegen/peaked_samples.py gives the reasons of the bounds, which tests/codegen measures in Triton's interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallax_gen.codegen.abi import torch_dtype
from parallax_gen.oracle.accuracy import errors, tolerance
from parallax_gen.oracle.peaked import peaked

# Times softmax attention's error. In rows of several alike keys the largest p of a fixed reference is rounded, too.
OF_DISTINCT_KEYS, OF_ALIKE_KEYS = 1.5, 1.6
ALIKE = ("twin keys", "six alike")  # several keys of nearly equal t share the weight


def of_rounding(dtype: str) -> float:
    """The error of an output's rounding alone. Where softmax attention is a row of v almost exactly, it has not even
    that; Parallax attention is no row of v."""
    return tolerance(dtype) / 6


def inputs(
    kind: str, head_dim: int, dtype: str, seqlen: int = 700, *, batch: int = 4, probes: float = 1.0, kv_heads: int = 2
) -> list[Tensor]:
    """(batch, seqlen, heads, head_dim), of unit variance before rows are peaked: |t| is about probes sqrt(head_dim)."""
    draw = torch.Generator("cuda").manual_seed(1)
    sizes = [(batch, seqlen, heads, head_dim) for heads in (4, 4, kv_heads, kv_heads)]
    q, r, k, v = (torch.randn(size, device="cuda", generator=draw) for size in sizes)
    q, k = peaked(kind, q, k, draw)
    return [x.to(torch_dtype(dtype)) for x in (q, probes * r, k, v)]


def times_the_error_of_softmax(out: Tensor, expected: Tensor, softmax: tuple[Tensor, Tensor], dtype: str) -> float:
    """softmax: as `softmax_attention` returns it."""
    return errors(out, expected).relative / max(errors(*softmax).relative, of_rounding(dtype))


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, *, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Softmax attention, with p and the output rounded to q's dtype as kernels do, and exact. window: with causal."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * q.shape[-1] ** -0.5
    last = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    keys = torch.arange(k.shape[1], device=q.device)
    if causal:
        s = s.masked_fill((keys > last) | (keys <= last - (window or k.shape[1])), -torch.inf)
    p = (s - s.amax(-1, keepdim=True)).exp()
    rounded, exact = (torch.einsum("bhij,bjhd->bihd", w, v.double()) for w in (p.to(q.dtype).double(), p))
    total = p.sum(-1).transpose(1, 2)[..., None]
    return (rounded / total).to(q.dtype), exact / total
