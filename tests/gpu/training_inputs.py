"""The inputs that tests of training steps on a card share."""

from __future__ import annotations

import torch
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*size, device="cuda", dtype=dtype)


def leaves(
    rows: tuple[int, ...],
    keys: tuple[int, ...],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    """By default 2 query heads per kv head, head_dim 64, bf16. s and t have unit variance."""
    torch.manual_seed(sum(rows) + head_dim)
    q, r = normal(*rows, heads, head_dim, dtype=dtype), normal(*rows, heads, head_dim, dtype=dtype)
    k, v = normal(*keys, kv_heads, head_dim, dtype=dtype), normal(*keys, kv_heads, head_dim, dtype=dtype)
    r.mul_(head_dim**-0.5)
    for x in (q, r, k, v):
        x.requires_grad_()
    return q, r, k, v
