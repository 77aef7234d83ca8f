"""Ring attention on several processes over gloo equals attention over the whole sequence in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
from assertions import assert_close
from attention_samples import plain_attention
from forked import run_ranks
from torch import Tensor

from parallax_gen.distributed import gather_sequence, ring_attn_func, shard_sequence
from parallax_gen.distributed.ring import _Ring
from parallax_gen.errors import ArgumentError
from parallax_gen.oracle.accuracy import errors, gradient_term_sizes

# (causal, queries per chunk, heads, kv heads, dtype, its name, softcap), including chunks of one query.
CASES = [
    (True, 3, 4, 2, torch.float32, "fp32", None),
    (False, 3, 4, 2, torch.float32, "fp32", 1.5),
    (True, 1, 3, 1, torch.float32, "fp32", 1.5),
    (True, 5, 2, 2, torch.bfloat16, "bf16", None),
]


def whole(chunk: int, chunks: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, r, k, v and do of the whole sequence, the same in every process."""
    generator = torch.Generator().manual_seed(chunk)
    sizes = [heads, heads, kv_heads, kv_heads, heads]
    tensors = [torch.randn(2, chunk * chunks, n, 16, generator=generator) for n in sizes]
    tensors[1] /= 4
    return [x.to(dtype) for x in tensors]


def check(rank: int, ranks: int, case: tuple[Any, ...]) -> None:
    causal, chunk, heads, kv_heads, dtype, name, softcap = case
    *inputs, do = whole(chunk, ranks * (2 if causal else 1), heads, kv_heads, dtype)
    assert torch.equal(gather_sequence(shard_sequence(inputs[0], causal=causal), causal=causal), inputs[0])
    shards = [shard_sequence(x, causal=causal).requires_grad_() for x in inputs]
    out = ring_attn_func(*shards, causal=causal, softcap=softcap)
    exact = [x.double().requires_grad_() for x in inputs]
    expected_out = plain_attention(*exact, causal=causal, softcap=softcap)
    assert_close(gather_sequence(out, causal=causal), expected_out, name)
    grads = torch.autograd.grad(out, shards, shard_sequence(do, causal=causal))
    expected_grads, sizes = torch.autograd.grad(expected_out, exact, do.double()), gradient_term_sizes(*inputs, do)
    for grad, x, expected, natural in zip(grads, shards, expected_grads, sizes, strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
        result = gather_sequence(grad, causal=causal)
        # Partial gradients are rounded to 16 bits before they are summed, besides the rounding of one backward.
        if name == "fp32":
            assert_close(result, expected, name, float(natural))
        else:
            assert errors(result, expected, float(natural)).relative < 2e-2


def work(rank: int, ranks: int) -> None:
    for case in CASES:
        check(rank, ranks, case)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ring_attention_equals_attention_on_one_rank(ranks: int, tmp_path: Path) -> None:
    run_ranks(work, ranks, tmp_path, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_ranks_have_equal_work_and_each_pair_is_computed_once(ranks: int) -> None:
    """The parts of all ranks together are the causal mask, chunk by chunk, and each rank has an equal amount of it."""
    seqlen, met, load = 4, set(), set()
    for rank in range(ranks):
        ring, pairs = _Ring(None, rank, ranks, 0, 0), 0
        place = [chunk * 2 + i for chunk in (rank, 2 * ranks - 1 - rank) for i in range(2)]
        for step in range(ranks):
            source = (rank - step) % ranks
            their_place = [chunk * 2 + i for chunk in (source, 2 * ranks - 1 - source) for i in range(2)]
            part = ring.visible(step, seqlen, causal=True)
            for i in range(seqlen)[part.rows]:
                for j in range(seqlen)[part.keys]:
                    if not part.causal or j <= i:
                        assert (place[i], their_place[j]) not in met
                        met.add((place[i], their_place[j]))
                        pairs += 1
        load.add(pairs)
    assert met == {(i, j) for i in range(4 * ranks) for j in range(i + 1)}
    assert len(load) == 1


def test_without_a_process_group_it_is_an_error() -> None:
    x = torch.zeros(1, 4, 2, 16)
    with pytest.raises(ArgumentError, match="init_process_group"):
        ring_attn_func(x, x, x, x)


def test_unsupported_derivatives_of_a_ring_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward-mode tangents, transforms of torch.func, and second derivatives."""
    monkeypatch.setattr(_Ring, "of", staticmethod(lambda group: _Ring(group, 0, 1, 0, 0)))
    inputs = [x.requires_grad_() for x in whole(4, 2, 4, 2, torch.float32)[:4]]
    q, *rest = inputs
    out = ring_attn_func(*inputs, causal=True)
    for grad in torch.autograd.grad(out.sum(), inputs, create_graph=True):
        with pytest.raises(ArgumentError, match=r"create_graph: .* first derivatives only"):
            torch.autograd.grad(grad.sum(), q, retain_graph=True)
    with pytest.raises(ArgumentError, match=r"k: got a tensor under a transform"):
        torch.func.grad(lambda k: ring_attn_func(q, rest[0], k, rest[2]).sum())(rest[1])
    with fw.dual_level():
        with pytest.raises(ArgumentError, match=r"q: got .*with a tangent"):
            ring_attn_func(fw.make_dual(q, q), *rest)
        out = ring_attn_func(*inputs, causal=True)
        with pytest.raises(ArgumentError, match=r"do: got .*with a tangent"):
            torch.autograd.grad(out, q, fw.make_dual(torch.ones_like(q), torch.ones_like(q)))
