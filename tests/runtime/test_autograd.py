"""Gradients of the public functions on CPU tensors: values, saved tensors, and autograd's rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from assertions import assert_close
from attention_samples import Sample, dense, packed
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from parallax_gen import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.errors import ArgumentError
from parallax_gen.oracle.reference import reference_forward, reference_varlen_forward
from parallax_gen.runtime import autograd

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")

MASKS: list[dict[str, Any]] = [{}, {"causal": True}, {"causal": True, "window_size": 2, "softmax_scale": 0.4}]
OPS = torch.ops.parallax_gen


def attend(sample: Sample, **options: Any) -> Any:
    function: Callable[..., Any] = parallax_attn_varlen_func if sample.lengths else parallax_attn_func
    return function(*sample.inputs, *sample.lengths, **options)


def oracle(sample: Sample, **options: Any) -> Tensor:
    if sample.lengths:
        return reference_varlen_forward(*sample.inputs, *sample.lengths[:2], **options).out
    return reference_forward(*sample.inputs, **options).out


def gradients(out: Tensor, inputs: Any, do: Tensor | None = None) -> tuple[Tensor, ...]:
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)) if do is None else do
    return torch.autograd.grad(out, inputs, do.to(out.dtype))


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")]
)
@pytest.mark.parametrize("options", MASKS, ids=["full", "causal", "window"])
@pytest.mark.parametrize("recompute_v_mean", [False, True])
@pytest.mark.parametrize("make", [dense, packed])
def test_gradients_agree_with_the_definition(
    make: Callable[..., Sample], recompute_v_mean: bool, options: dict[str, Any], dtype: torch.dtype, name: str
) -> None:
    sample = make(dtype=dtype)
    result = gradients(attend(sample, **options, recompute_v_mean=recompute_v_mean), sample.inputs)
    for x, grad, expected in zip(
        sample.inputs, result, gradients(oracle(sample, **options), sample.inputs), strict=True
    ):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
        assert_close(grad, expected.double(), name)


@pytest.mark.parametrize("seqlens", [(7, 4), (1, 6), (6, 1)])
def test_gradients_of_causal_rows_that_see_no_key_are_zero(seqlens: tuple[int, int]) -> None:
    sample = dense(*seqlens)
    result = gradients(attend(sample, causal=True), sample.inputs)
    for grad, expected in zip(result, gradients(oracle(sample, causal=True), sample.inputs), strict=True):
        assert_close(grad, expected.double(), "fp32")
    unseeing = max(0, seqlens[0] - seqlens[1])
    assert not result[0][:, :unseeing].any()
    assert not result[1][:, :unseeing].any()


@pytest.mark.parametrize("make", [dense, packed])
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_only_needed_gradients_are_returned(make: Callable[..., Sample], needed: tuple[int, ...]) -> None:
    sample = make()
    all_gradients = gradients(attend(sample), sample.inputs)
    for place, x in enumerate(sample.inputs):
        x.requires_grad_(place in needed)
    attend(sample).backward(torch.randn(all_gradients[0].shape, generator=torch.Generator().manual_seed(3)))
    for place, x in enumerate(sample.inputs):
        assert (x.grad is not None) == (place in needed)
        assert x.grad is None or torch.equal(x.grad, all_gradients[place])


def test_out_is_the_same_with_and_without_gradients() -> None:
    for sample in (dense(), packed()):
        out = attend(sample)
        with torch.no_grad():
            assert torch.equal(out, attend(sample))
        with torch.inference_mode():
            assert torch.equal(out, attend(sample))


def saved_tensors(call: Callable[[], Any]) -> list[Tensor]:
    """The tensors that a call saves for its backward."""
    result: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        result.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        call()
    return result


@pytest.mark.parametrize("make", [dense, packed])
def test_saved_tensors(make: Callable[..., Sample]) -> None:
    sample = make(dtype=torch.float16)
    q = sample.inputs[0]
    input_pointers = {
        x.data_ptr() for x in (*sample.inputs, *sample.lengths[:2])
    }  # saved, but not allocated by the call
    rows = q[..., 0].numel()
    sizes = [
        sum(
            x.nbytes
            for x in saved_tensors(lambda r=r: attend(sample, recompute_v_mean=r))
            if x.data_ptr() not in input_pointers
        )
        for r in (False, True)
    ]
    assert sizes == [2 * q.nbytes + 8 * rows, q.nbytes + 8 * rows]  # out, lse and t̄; with v̄ or without
    with torch.no_grad():
        assert saved_tensors(lambda: attend(sample)) == []
    for x in sample.inputs:
        x.requires_grad_(False)
    assert saved_tensors(lambda: attend(sample)) == []


def test_statistics_have_no_gradients() -> None:
    sample = dense()
    out, *stats = attend(sample, return_stats=True)
    assert out.requires_grad
    assert not any(x.requires_grad for x in stats)
    plain, *_ = attend(sample, return_stats=True, recompute_v_mean=True)
    for a, b in zip(gradients(out, sample.inputs), gradients(plain, sample.inputs), strict=True):
        assert torch.equal(a, b)


def test_output_gradients_with_any_strides() -> None:
    sample = dense()
    shape = sample.inputs[0].shape
    odd = [
        torch.ones(()).expand(shape),
        torch.randn(2, 4, 16, 5).permute(0, 3, 1, 2),
        torch.randn(2, 5, 8, 16)[:, :, ::2],
        torch.randn(1, 5, 1, 16).expand(shape),
    ]
    for do in odd:
        result = gradients(attend(sample), sample.inputs, do)
        expected = gradients(attend(sample), sample.inputs, do.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    attend(sample).sum().backward()


def test_an_output_that_is_used_twice() -> None:
    sample = dense()
    out = attend(sample)
    result = torch.autograd.grad((2 * out).sum() + out.sum(), sample.inputs)
    for grad, once in zip(result, gradients(attend(sample), sample.inputs, torch.ones(out.shape)), strict=True):
        assert_close(grad, 3 * once.double(), "fp32")


def test_one_tensor_as_several_inputs() -> None:
    x = dense(6, 6).inputs[0]
    result = torch.autograd.grad(parallax_attn_func(x, x, x, x, causal=True).sum(), x)
    expected = torch.autograd.grad(reference_forward(x, x, x, x, causal=True).out.sum(), x)
    assert_close(result[0], expected[0].double(), "fp32")


def test_inputs_with_any_strides() -> None:
    fused_projection = torch.randn(2, 5, 10, 16, requires_grad=True)
    heads_first = torch.randn(2, 2, 5, 16, requires_grad=True)
    shared = torch.randn(2, 5, 1, 16, requires_grad=True)
    q, r, k, v = (
        fused_projection[:, :, :4],
        fused_projection[:, :, 4:8],
        heads_first.transpose(1, 2),
        shared.expand(2, 5, 2, 16),
    )
    leaves = (fused_projection, heads_first, shared)
    result = gradients(parallax_attn_func(q, r, k, v), leaves)
    for grad, expected in zip(result, gradients(reference_forward(q, r, k, v).out, leaves), strict=True):
        assert_close(grad, expected.double(), "fp32")


def test_gradients_of_expanded_inputs_do_not_share_memory() -> None:
    v = torch.randn(2, 7, 1, 16).expand(2, 7, 2, 16).requires_grad_()
    q, r, k, _ = dense().inputs
    grad = gradients(parallax_attn_func(q, r, k, v), v)[0]
    assert grad.is_contiguous()
    assert_close(grad, gradients(reference_forward(q, r, k, v).out, v)[0].double(), "fp32")


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_kv"), [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty_tensors_have_gradients_of_zero(batch: int, seqlen_q: int, seqlen_kv: int) -> None:
    q, r = (torch.randn(batch, seqlen_q, 4, 16, requires_grad=True) for _ in range(2))
    k, v = (torch.randn(batch, seqlen_kv, 2, 16, requires_grad=True) for _ in range(2))
    out = parallax_attn_func(q, r, k, v, causal=True)
    assert not out.any()
    out.sum().backward()
    for x in (q, r, k, v):
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert not x.grad.any()


def test_packed_sequences_without_a_token_have_gradients_of_zero() -> None:
    inputs, (starts, *_) = packed()
    zeros = torch.zeros_like(starts)
    result = torch.autograd.grad(parallax_attn_varlen_func(*inputs, starts, zeros, 5, 0).sum(), inputs)
    assert not any(grad.any() for grad in result)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", [dense, packed])
def test_activation_checkpointing(make: Callable[..., Sample], use_reentrant: bool) -> None:
    sample = make()

    def block(*inputs: Tensor) -> Tensor:
        out: Tensor = attend(Sample(inputs, sample.lengths), causal=True)  # type: ignore[arg-type]
        return out * 2

    do = torch.randn(sample.inputs[0].shape)
    checkpoint(block, *sample.inputs, use_reentrant=use_reentrant).backward(do)
    for x, expected in zip(sample.inputs, gradients(block(*sample.inputs), sample.inputs, do), strict=True):
        assert x.grad is not None
        assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("records", [False, True])
def test_autocast_casts_the_inputs(records: bool) -> None:
    sample = dense()
    q, r, k, v = (x.requires_grad_(records) for x in sample.inputs)
    mixed = (q, r.half(), k.bfloat16(), v)
    with torch.autocast("cpu", torch.bfloat16):
        out = parallax_attn_func(*mixed)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, parallax_attn_func(*(x.bfloat16() for x in mixed)))
    if records:
        result = gradients(out, (q, r, k, v))
        assert [x.dtype for x in result] == [torch.float32] * 4


def test_a_second_derivative_is_refused() -> None:
    sample = dense()
    first = torch.autograd.grad(attend(sample).sum(), sample.inputs, create_graph=True)
    with pytest.raises(ArgumentError, match=r"create_graph: .* first derivatives only"):
        first[0].sum().backward()


def test_out_is_refused_with_gradients() -> None:
    sample = dense()
    with pytest.raises(ArgumentError, match="out: got a tensor, where gradients are recorded"):
        attend(sample, out=torch.empty(sample.inputs[0].shape))
    with torch.no_grad():
        attend(sample, out=torch.empty(sample.inputs[0].shape))


def test_gradients_are_deterministic() -> None:
    sample = packed()
    one, two = (gradients(attend(sample, causal=True), sample.inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("make", [dense, packed])
def test_the_autograd_function_and_the_operator_agree(make: Callable[..., Sample]) -> None:
    """Eager calls record a torch.autograd.Function; compiled calls use an operator with the same backward."""
    sample = make()
    arguments = (*sample.inputs, *(sample.lengths or (None, None, 0, 0)), True, 3, None, 1.5, False)
    out = OPS.attention_with_stats(*arguments, False)[0]
    eager = attend(sample, causal=True, window_size=3, softcap=1.5)
    assert torch.equal(out, eager)
    for a, b in zip(gradients(out, sample.inputs), gradients(eager, sample.inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [dense, packed])
@pytest.mark.parametrize("recompute_v_mean", [False, True])
def test_operators_pass_opcheck(make: Callable[..., Sample], recompute_v_mean: bool) -> None:
    sample = make()
    arguments = (*sample.inputs, *(sample.lengths or (None, None, 0, 0)), True, 3, None, 1.5, True)
    opcheck(OPS.attention_with_stats, (*arguments, recompute_v_mean))
    arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    opcheck(OPS.attention, arguments)
    out, lse, t_mean, v_mean = OPS.attention_with_stats(*arguments, False)
    saved = (torch.randn_like(out), out, lse, t_mean, None if recompute_v_mean else v_mean)
    for expected in ((True, True), (True, False), (False, True)):
        opcheck(OPS.attention_backward, (*arguments, *saved, *expected))


def test_fake_tensors_go_through_the_operators() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(2, 5, 4, 16), torch.empty(2, 7, 2, 16)
        result = parallax_attn_func(q, q, k, k, return_stats=True)
        grads = torch.autograd.grad(parallax_attn_func(q, q.requires_grad_(), k, k).sum(), q)
    assert [tuple(x.shape) for x in result] == [(2, 5, 4, 16), (2, 4, 5), (2, 4, 5), (2, 5, 4, 16)]
    assert grads[0].shape == q.shape
    assert not autograd.are_plain_tensors(*result)
