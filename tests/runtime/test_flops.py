"""FlopCounterMode counts attention like `work_of`: eager with and without gradients, transformed, fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_samples import dense, packed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from parallax_gen import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.distributed import ring_attn_func
from parallax_gen.distributed.ring import _Ring
from parallax_gen.integrations.drop_in.parallax_kernel_training import parallax_bwd, parallax_fwd
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import work_of

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings about CPU tensors and of torch

OPS = torch.ops.parallax_gen
FORWARD = 8 * 2 * 4 * 5 * 7 * 16  # FLOPs of dense(): two sequences, four heads, 5 queries, 7 keys, head_dim 16


def counted(call: Any) -> dict[Any, int]:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_flop_counts().get("Global", {})


def test_a_forward_without_gradients() -> None:
    q, r, k, v = (x.detach() for x in dense().inputs)
    assert counted(lambda: parallax_attn_func(q, r, k, v)) == {OPS.attention: FORWARD}
    assert counted(lambda: parallax_attn_func(q, r, k, v, return_stats=True)) == {OPS.attention_with_stats: FORWARD}
    out = torch.empty_like(q)
    assert counted(lambda: parallax_attn_func(q, r, k, v, out=out)) == {OPS.attention: FORWARD}
    torch.testing.assert_close(out, parallax_attn_func(q, r, k, v))
    inputs = dense().inputs
    with torch.no_grad():
        assert counted(lambda: parallax_attn_func(*inputs)) == {OPS.attention: FORWARD}


@pytest.mark.parametrize(("needed", "matmuls"), [((0, 1, 2, 3), 8), ((0,), 5), ((1,), 5), ((3,), 6), ((1, 2), 8)])
def test_a_backward_by_needed_gradients(needed: tuple[int, ...], matmuls: int) -> None:
    inputs = tuple(x.requires_grad_(i in needed) for i, x in enumerate(dense().inputs))
    counts = counted(lambda: parallax_attn_func(*inputs).sum().backward())
    assert counts == {OPS.attention_with_stats: FORWARD, OPS.attention_backward: FORWARD // 4 * matmuls}
    out = parallax_attn_func(*inputs, recompute_v_mean=True).sum()
    assert counted(out.backward) == {OPS.attention_backward: FORWARD // 4 * (matmuls + 4)}


@pytest.mark.parametrize("seqlens", [(8, 8), (5, 7), (7, 4)])
@pytest.mark.parametrize("window", [None, 3])
def test_masks_count_as_in_work_of(seqlens: tuple[int, int], window: int | None) -> None:
    inputs = [x.detach() for x in dense(*seqlens).inputs]
    result = counted(lambda: parallax_attn_func(*inputs, causal=True, window_size=window))
    spec = KernelSpec("forward", 16, "fp32", group=2, causal=True, window=window is not None)
    assert result == {OPS.attention: work_of(spec, Shape(2, 4, 2, *seqlens, window or 0)).flops}


def test_packed_sequences_count_their_own_lengths() -> None:
    inputs, (starts_q, starts_k, *longest) = packed()
    pairs = sum(a * b for a, b in zip(starts_q.diff().tolist(), starts_k.diff().tolist(), strict=True))
    result = counted(lambda: parallax_attn_varlen_func(*inputs, starts_q, starts_k, *longest).sum().backward())
    assert result == {OPS.attention_with_stats: 8 * 4 * 16 * pairs, OPS.attention_backward: 16 * 4 * 16 * pairs}


def test_fake_packed_sequences_count_with_max_seqlen() -> None:
    with FakeTensorMode():
        q, k, starts = torch.empty(9, 4, 16), torch.empty(11, 2, 16), torch.zeros(6, dtype=torch.int32)
        result = counted(lambda: parallax_attn_varlen_func(q, q, k, k, starts, starts, 5, 7))
    assert result == {OPS.attention: 8 * 4 * 16 * 5 * (5 * 7)}


def test_without_any_key_nothing_is_counted() -> None:
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 0, 2, 16)
    assert sum(counted(lambda: parallax_attn_func(q, q, k, k, causal=True)).values()) == 0


def test_transforms_are_counted() -> None:
    inputs = [x.detach()[None] for x in dense().inputs]
    per_sample = torch.func.vmap(torch.func.grad(lambda *x: parallax_attn_func(*x).sum(), (0, 1, 2, 3)))
    result = counted(lambda: per_sample(*inputs))
    assert result == {OPS.attention_with_stats: FORWARD, OPS.attention_backward: 2 * FORWARD}


def test_compiled_calls_are_counted() -> None:
    call = torch.compile(parallax_attn_func, backend="aot_eager")
    inputs = dense().inputs
    call(*inputs)
    result = counted(lambda: call(*inputs).sum().backward())
    assert result == {OPS.attention_with_stats: FORWARD, OPS.attention_backward: 2 * FORWARD}
    torch._dynamo.reset()


def test_the_parts_of_a_ring_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Ring, "of", staticmethod(lambda group: _Ring(group, 0, 1, 0, 0)))
    inputs = dense(6, 6).inputs
    result = counted(lambda: ring_attn_func(*inputs).sum().backward())
    all_pairs_flops = 8 * 2 * 4 * 6 * 6 * 16
    assert result == {OPS.attention_with_stats: all_pairs_flops, OPS.attention_backward: 2 * all_pairs_flops}
    grads = [x.grad for x in inputs]
    expected = dense(6, 6).inputs
    ring_attn_func(*expected).sum().backward()  # without a counter, so without operators
    for grad, x in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, x.grad)


def test_the_drop_in_forward_and_backward_are_counted() -> None:
    q, r, k, v = (x.detach().transpose(1, 2).flatten(0, 1).bfloat16() for x in dense(8, 8).inputs)
    kept: list[torch.Tensor] = []
    square = 8 * 2 * 4 * 8 * 8 * 16 // 2  # causal
    assert counted(lambda: kept.extend(parallax_fwd(q, r, k, v, 0.25, 2))) == {OPS.attention_with_stats: square}
    result = counted(lambda: kept.extend(parallax_bwd(q, r, k, v, *kept, kept[0], 0.25, 2)))
    assert result == {OPS.attention_backward: 2 * square}
    for counter, plain in zip(kept[5:], parallax_bwd(q, r, k, v, *kept[:5], kept[0], 0.25, 2), strict=True):
        torch.testing.assert_close(counter, plain)
