"""Inputs for the public functions, small enough for the fp64 reference on a CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """q, r, k, v, and of packed sequences the positional arguments behind them."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    lengths: tuple[Tensor, Tensor, int, int] | tuple[()] = ()


def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


def inputs_of(
    rows: tuple[int, ...], keys: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaves that need gradients: 4 query heads and 2 kv heads of width 16."""
    q, r = normal(*rows, 4, 16, dtype=dtype), normal(*rows, 5, 16, dtype=dtype)[..., 1:, :].contiguous() / 4
    k, v = normal(*keys, 2, 16, dtype=dtype), normal(*keys, 3, 16, dtype=dtype)[..., 1:, :].contiguous()
    q, r, k, v = (x.requires_grad_() for x in (q, r, k, v))
    return q, r, k, v


def dense(seqlen_q: int = 5, seqlen_kv: int = 7, dtype: torch.dtype = torch.float32) -> Sample:
    """Two sequences."""
    return Sample(inputs_of((2, seqlen_q), (2, seqlen_kv), dtype))


def packed(dtype: torch.dtype = torch.float32) -> Sample:
    """Five sequences; one has no queries, one no keys, one neither."""
    starts_q = torch.tensor([0, 2, 2, 2, 4, 9], dtype=torch.int32)
    starts_k = torch.tensor([0, 3, 4, 4, 4, 11], dtype=torch.int32)
    return Sample(inputs_of((9,), (11,), dtype), (starts_q, starts_k, 5, 7))


def padded(dtype: torch.dtype = torch.float32) -> Sample:
    """`packed` between rows that no sequence has: of q and r one and 12, of k and v two and 9. They hold NaN."""
    inputs, (starts_q, starts_k, *longest) = packed(dtype)
    padding = ((1, 12), (1, 12), (2, 9), (2, 9))
    wider = (
        torch.nn.functional.pad(x.detach(), (0, 0, 0, 0, *sides), value=torch.nan)
        for x, sides in zip(inputs, padding, strict=True)
    )
    q, r, k, v = (x.requires_grad_() for x in wider)
    return Sample((q, r, k, v), (starts_q + 1, starts_k + 2, *longest))
