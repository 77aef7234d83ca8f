"""Attention over parts of the keys by the kernels: merged, and differentiated part by part, as in ring attention."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_close
from torch import Tensor

from parallax_gen import State, merge_states, parallax_attn_func, parallax_attn_with_kvcache
from parallax_gen.oracle.accuracy import errors, tolerance
from parallax_gen.oracle.reference import reference_backward, reference_forward
from parallax_gen.runtime.attention import SavedForBackward, backward
from parallax_gen.runtime.requests import Request

pytestmark = pytest.mark.gpu


def sample(seqlen: int) -> tuple[Tensor, ...]:
    """q, r, k, v and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(3)
    sizes = [(2, seqlen, heads, 128) for heads in (4, 4, 2, 2, 4)]
    q, r, k, v, do = (torch.randn(size, device="cuda", generator=generator) for size in sizes)
    return tuple(x.bfloat16() for x in (q, r * 128**-0.5, k, v, do))


def test_two_parts_of_a_ring_equal_the_whole() -> None:
    """The second half of the queries sees the first half of the keys without a mask, and the rest causally."""
    q, r, k, v, do = sample(1024)
    half = 512
    diagonal = [
        State(*parallax_attn_func(q[:, rows], r[:, rows], k[:, rows], v[:, rows], causal=True, return_stats=True))
        for rows in (slice(0, half), slice(half, None))
    ]
    late = (q[:, half:], r[:, half:], k[:, :half], v[:, :half])
    joined = merge_states(diagonal[1], parallax_attn_func(*late, return_stats=True))  # type: ignore[arg-type]
    result = State(
        *(torch.cat(parts, 2 if parts[0].dim() == 3 else 1) for parts in zip(diagonal[0], joined, strict=True))
    )
    assert_close(result.out, reference_forward(q, r, k, v, causal=True).out, "bf16")

    def gradients(partial: Request, rows: slice) -> tuple[Tensor, ...]:
        out, lse, t_mean, v_mean = result
        parts = (out[:, rows], lse[..., rows], t_mean[..., rows], v_mean[:, rows])
        saved = SavedForBackward(*(x.contiguous() for x in parts))
        return backward(do[:, rows], partial, saved, dqdr=True, dkdv=True, keys_are_partial=True)

    second = slice(half, None)
    first_keys = gradients(Request(*late), second)
    # And each half of the queries over its own half of the keys.
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in (q, r, k, v)]
    for rows in (slice(0, half), second):
        own_rows = tuple(x[:, rows] for x in (q, r, k, v))
        for total, grad in zip(sums, gradients(Request(*own_rows, causal=True), rows), strict=True):
            total[:, rows] += grad
    for total, grad, rows in zip(sums, first_keys, (second, second, slice(0, half), slice(0, half)), strict=True):
        total[:, rows] += grad
    for total, expected in zip(sums, reference_backward(q, r, k, v, do, causal=True), strict=True):
        # Partial gradients are rounded to 16 bits an additional time.
        assert errors(total, expected).relative <= 2 * tolerance("bf16")


def test_pages_in_a_captured_graph() -> None:
    """A captured graph works for other lengths and another page table in the same tensors."""
    batch, pages, page_size = 4, 8, 16
    generator = torch.Generator("cuda").manual_seed(4)
    q = torch.randn(batch, 1, 8, 128, device="cuda", generator=generator).bfloat16()
    r = q * 128**-0.5
    k, v = (
        torch.randn(batch * pages, page_size, 2, 128, device="cuda", generator=generator).bfloat16() for _ in range(2)
    )
    table = torch.randperm(batch * pages, device="cuda", generator=generator).view(batch, pages).int()
    lengths = torch.tensor([128, 1, 77, 0], device="cuda", dtype=torch.int32)
    out = torch.empty_like(q)

    def attend() -> None:
        parallax_attn_with_kvcache(q, r, k, v, cache_seqlens=lengths, page_table=table, out=out)

    def check() -> None:
        dense = (x[table.long()].flatten(1, 2) for x in (k, v))
        assert_close(out, reference_forward(q, r, *dense, cache_seqlens=lengths).out, "bf16")

    attend()
    check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    table.copy_(table.flip(0))
    lengths.copy_(torch.tensor([3, 128, 64, 65], device="cuda", dtype=torch.int32))
    graph.replay()
    torch.cuda.synchronize()
    check()
