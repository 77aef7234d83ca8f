"""The oracle against torch's attention and against a loop over rows; error measures; random inputs."""

from __future__ import annotations

import math

import pytest
import torch
from assertions import assert_close
from torch import Tensor

from parallax_gen.codegen.abi import torch_dtype
from parallax_gen.errors import ArgumentError
from parallax_gen.oracle import reference
from parallax_gen.oracle.accuracy import Errors, errors, tolerance, why_wrong
from parallax_gen.oracle.inputs import random_inputs
from parallax_gen.oracle.reference import (
    reference_backward,
    reference_forward,
    reference_varlen_backward,
    reference_varlen_forward,
)
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import DTYPES, KernelSpec

EXACT = {"rtol": 1e-11, "atol": 1e-12}  # both sides are float64


def inputs(
    batch: int, heads: int, kv_heads: int, seqlen_q: int, seqlen_kv: int, head_dim: int = 16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seqlen_q + 1000 * seqlen_kv)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    q, r = normal(batch, seqlen_q, heads, head_dim), normal(batch, seqlen_q, heads, head_dim)
    k, v = normal(batch, seqlen_kv, kv_heads, head_dim), normal(batch, seqlen_kv, kv_heads, head_dim)
    return q, r / 4, k, v


def by_rows(
    q: Tensor, r: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, lengths: list[int], window: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parallax attention as v̄ minus the covariance of t and v, one query at a time, over its visible keys."""
    batch, seqlen_q, heads, _ = q.shape
    group = heads // k.shape[2]
    out, v_mean = torch.zeros_like(q), torch.zeros_like(q)
    t_mean = torch.zeros(batch, heads, seqlen_q, dtype=q.dtype)
    lse = torch.full_like(t_mean, -math.inf)
    for b in range(batch):
        for h in range(heads):
            for i in range(seqlen_q):
                sees = min(lengths[b], lengths[b] - seqlen_q + i + 1) if causal else lengths[b]
                if sees <= 0:
                    continue
                first = max(0, sees - window) if window else 0
                keys, values = k[b, first:sees, h // group], v[b, first:sees, h // group]
                weights = torch.exp(scale * (keys @ q[b, i, h]))
                p = weights / weights.sum()
                t = keys @ r[b, i, h]
                mean = torch.dot(p, t)
                covariance = sum(p[j] * (t[j] - mean) * values[j] for j in range(len(t)))
                v_mean[b, i, h] = p @ values
                out[b, i, h] = v_mean[b, i, h] - covariance
                lse[b, h, i] = math.log(weights.sum().item())
                t_mean[b, h, i] = mean
    return out, lse, t_mean, v_mean


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_without_probes_it_is_softmax_attention(causal: bool, kv_heads: int) -> None:
    q, r, k, v = inputs(2, 6, kv_heads, 33, 33)
    result = reference_forward(q, torch.zeros_like(r), k, v, causal=causal)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(result.out, expected, **EXACT)
    torch.testing.assert_close(result.v_mean, expected, **EXACT)
    assert not result.t_mean.any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "seqlen_q", "seqlen_kv"),
    [(2, 2, 7, 7), (6, 2, 3, 9), (3, 1, 9, 4), (1, 1, 1, 11), (4, 2, 5, 1)],
)
def test_against_the_covariance_form(causal: bool, heads: int, kv_heads: int, seqlen_q: int, seqlen_kv: int) -> None:
    q, r, k, v = inputs(2, heads, kv_heads, seqlen_q, seqlen_kv)
    result = reference_forward(q, r, k, v, causal=causal)
    expected = by_rows(q, r, k, v, causal=causal, scale=q.shape[-1] ** -0.5, lengths=[seqlen_kv] * 2)
    for name, tensor, expected_tensor in zip(result._fields, result, expected, strict=True):
        torch.testing.assert_close(tensor, expected_tensor, msg=lambda m, name=name: f"{name}: {m}", **EXACT)


@pytest.mark.parametrize("window", [1, 2, 5, 8, 9, 100])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "seqlen_q", "seqlen_kv"),
    [(2, 2, 7, 7), (6, 2, 3, 9), (3, 1, 9, 4), (1, 1, 1, 11), (4, 2, 5, 1)],
)
def test_a_window_against_the_covariance_form(
    window: int, heads: int, kv_heads: int, seqlen_q: int, seqlen_kv: int
) -> None:
    q, r, k, v = inputs(2, heads, kv_heads, seqlen_q, seqlen_kv)
    result = reference_forward(q, r, k, v, causal=True, window_size=window)
    expected = by_rows(q, r, k, v, causal=True, scale=q.shape[-1] ** -0.5, lengths=[seqlen_kv] * 2, window=window)
    for name, tensor, expected_tensor in zip(result._fields, result, expected, strict=True):
        torch.testing.assert_close(tensor, expected_tensor, msg=lambda m, name=name: f"{name}: {m}", **EXACT)


@pytest.mark.parametrize(("causal", "window"), [(False, 4), (True, 0), (True, -1)])
def test_a_window_needs_causal_and_at_least_one_key(causal: bool, window: int) -> None:
    with pytest.raises(ArgumentError, match=r"^window_size: got .*; allowed: None, or 1 or more with causal=True$"):
        reference_forward(*inputs(1, 2, 2, 4, 6), causal=causal, window_size=window)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 3)])
def test_gradients_against_autograd_through_the_covariance_form(
    causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_SCORES_AT_ONCE", 2 * 9 * 3)  # in chunks of three queries
    leaves = tuple(x.requires_grad_() for x in inputs(2, 4, 2, 11, 9))
    do = inputs(2, 4, 2, 11, 9)[0].flip(0)
    out = by_rows(*leaves, causal=causal, scale=0.3, lengths=[9, 9], window=window or 0)[0]
    expected = torch.autograd.grad(out, leaves, do)
    result = reference_backward(*leaves, do, causal=causal, window_size=window, softmax_scale=0.3)
    for name, tensor, expected_tensor in zip(result._fields, result, expected, strict=True):
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, expected_tensor, msg=lambda m, name=name: f"{name}: {m}", **EXACT)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 3)])
def test_packed_sequences_are_independent(causal: bool, window: int | None) -> None:
    lengths_q, lengths_k = (5, 0, 7, 1, 3), (4, 6, 7, 9, 0)
    ends_q, ends_k = ([sum(lengths[:n]) for n in range(6)] for lengths in (lengths_q, lengths_k))
    q, r, k, v = (x[0] for x in inputs(1, 4, 2, ends_q[-1], ends_k[-1]))
    do = q.flip(0)
    how = {"causal": causal, "window_size": window, "softmax_scale": 0.3}
    result = reference_varlen_forward(q, r, k, v, torch.tensor(ends_q, dtype=torch.int32), ends_k, **how)
    grads = reference_varlen_backward(q, r, k, v, do, ends_q, ends_k, **how)
    assert [tuple(x.shape) for x in result] == [(16, 4, 16), (4, 16), (4, 16), (16, 4, 16)]
    assert [x.shape for x in grads] == [q.shape, r.shape, k.shape, v.shape]
    for b, (of_q, of_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows, keys = slice(ends_q[b], ends_q[b] + of_q), slice(ends_k[b], ends_k[b] + of_k)
        sequence = [x[None].requires_grad_() for x in (q[rows], r[rows], k[keys], v[keys])]
        expected = by_rows(*sequence, causal=causal, scale=0.3, lengths=[of_k], window=window or 0)
        tensors = (result.out[rows], result.lse[:, rows], result.t_mean[:, rows], result.v_mean[rows])
        for x, expected_tensor in zip(tensors, expected, strict=True):
            torch.testing.assert_close(x, expected_tensor[0], **EXACT)
        of_one = [torch.zeros_like(x) for x in sequence]
        if expected[0].requires_grad:
            of_one = torch.autograd.grad(
                expected[0], sequence, do[rows][None], allow_unused=True, materialize_grads=True
            )
        for x, expected_tensor in zip(
            (grads.dq[rows], grads.dr[rows], grads.dk[keys], grads.dv[keys]), of_one, strict=True
        ):
            torch.testing.assert_close(x, expected_tensor[0], **EXACT)


def test_cu_seqlens_of_queries_and_keys_have_equal_lengths() -> None:
    q, r, k, v = (x[0] for x in inputs(1, 2, 2, 4, 6))
    with pytest.raises(ArgumentError, match=r"^cu_seqlens_k: got 2 numbers; allowed: 3, as cu_seqlens_q has$"):
        reference_varlen_forward(q, r, k, v, [0, 2, 4], [0, 6])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_keys_past_a_sequences_end_are_ignored(causal: bool, poison: float, as_tensor: bool) -> None:
    lengths = [8, 5, 2, 0]
    q, r, k, v = inputs(4, 4, 2, 3, 8)
    expected = by_rows(q, r, k, v, causal=causal, scale=0.25, lengths=lengths)
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = poison, poison
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32) if as_tensor else lengths
    result = reference_forward(q, r, k, v, causal=causal, cache_seqlens=cache_seqlens)
    for tensor, expected_tensor in zip(result, expected, strict=True):
        torch.testing.assert_close(tensor, expected_tensor, **EXACT)


def test_rows_that_see_no_key_are_zero() -> None:
    q, r, k, v = inputs(1, 2, 1, 6, 2)
    result = reference_forward(q, r, k, v, causal=True)
    assert not result.out[:, :4].any()
    assert not result.v_mean[:, :4].any()
    assert not result.t_mean[..., :4].any()
    assert (result.lse[..., :4] == -math.inf).all()
    assert result.out[:, 4:].all()
    assert result.lse[..., 4:].isfinite().all()


def test_gradients_are_zero_for_rows_that_see_no_key() -> None:
    q, r, k, v = (x.requires_grad_() for x in inputs(1, 2, 1, 6, 2))
    reference_forward(q, r, k, v, causal=True).out.sum().backward()
    for x in (q, r, k, v):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.any()
    assert q.grad is not None
    assert not q.grad[:, :4].any()


def test_softmax_scale_scales_scores_and_not_t() -> None:
    q, r, k, v = inputs(1, 2, 2, 4, 6)
    result = reference_forward(q, r, k, v, softmax_scale=0.7)
    for tensor, expected_tensor in zip(result, by_rows(q, r, k, v, causal=False, scale=0.7, lengths=[6]), strict=True):
        torch.testing.assert_close(tensor, expected_tensor, **EXACT)
    uniform = reference_forward(q, r, k, v, softmax_scale=0.0)
    torch.testing.assert_close(uniform.t_mean[0, 1], k[0, :, 1].mean(dim=0) @ r[0, :, 1].T, **EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_results_do_not_depend_on_chunks_of_queries(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, r, k, v = inputs(1, 4, 2, 11, 9)
    whole = reference_forward(q, r, k, v, causal=causal, cache_seqlens=[7])
    monkeypatch.setattr(reference, "_SCORES_AT_ONCE", 2 * 7 * 3)  # three queries of a group of two
    for tensor, expected_tensor in zip(
        reference_forward(q, r, k, v, causal=causal, cache_seqlens=[7]), whole, strict=True
    ):
        torch.testing.assert_close(tensor, expected_tensor, **EXACT)


def test_sums_are_float64_for_any_input_dtype() -> None:
    q, r, k, v = inputs(1, 2, 2, 4, 6)
    low = [x.bfloat16() for x in (q, r, k, v)]
    result, same = reference_forward(*low), reference_forward(*(x.double() for x in low))
    assert {x.dtype for x in result} == {torch.float64}
    for tensor, expected_tensor in zip(result, same, strict=True):
        torch.testing.assert_close(tensor, expected_tensor, **EXACT)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"q": torch.zeros(1, 4, 16)}, "q"),
        ({"r": torch.zeros(1, 4, 2, 16)}, "r"),
        ({"k": torch.zeros(1, 6, 2, 8)}, "k"),
        ({"k": torch.zeros(2, 6, 2, 16)}, "k"),
        ({"k": torch.zeros(1, 6, 3, 16)}, "k"),
        ({"v": torch.zeros(1, 5, 2, 16)}, "v"),
        ({"cache_seqlens": [7]}, "cache_seqlens"),
        ({"cache_seqlens": [-1]}, "cache_seqlens"),
        ({"cache_seqlens": [1, 2]}, "cache_seqlens"),
        ({"cache_seqlens": [1.5]}, "cache_seqlens"),
        ({"cache_seqlens": [True]}, "cache_seqlens"),
    ],
)
def test_mismatched_arguments_are_named(change: dict[str, object], argument: str) -> None:
    good = dict(zip("qrkv", inputs(1, 4, 2, 4, 6), strict=True))
    with pytest.raises(ArgumentError, match=f"^{argument}: got "):
        reference_forward(**{**good, **change})  # type: ignore[arg-type]


def test_errors() -> None:
    ref = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    assert errors(ref, ref) == Errors(0.0, 0.0, 0.0)
    result = errors(ref + torch.tensor([[0.0, 0.0], [0.5, 0.0]]), ref)
    assert result == Errors(relative=pytest.approx(0.5 / 50**0.5), worst=pytest.approx(0.1), maximum=0.5)


def test_errors_at_zero_nan_and_infinity() -> None:
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    assert errors(zero, zero) == Errors(0.0, 0.0, 0.0)
    assert errors(zero[:0], zero[:0]) == Errors(0.0, 0.0, 0.0)
    assert errors(one, zero) == Errors(math.inf, math.inf, 1.0)
    hole = one.clone()
    hole[1, 0] = math.nan
    assert errors(hole, one) == errors(one, hole) == errors(hole, hole) == Errors(math.inf, math.inf, math.inf)
    empty_row = torch.tensor([-math.inf, 1.0, 2.0])
    assert errors(empty_row, empty_row) == Errors(0.0, 0.0, 0.0)
    assert errors(torch.tensor([0.0, 1.0, 2.0]), empty_row).relative == math.inf
    assert errors(empty_row, torch.tensor([0.0, 1.0, 2.0])).relative == math.inf


def test_errors_of_different_shapes() -> None:
    with pytest.raises(ArgumentError, match=r"out: got \(2, 1\); allowed: the reference's shape, \(2, 2\)"):
        errors(torch.zeros(2, 1), torch.zeros(2, 2))


def to_tf32(x: Tensor) -> Tensor:
    """Truncate to the ten mantissa bits of tf32, as tensor cores do."""
    return (x.contiguous().view(torch.int32) & ~((1 << 13) - 1)).view(torch.float32)


def tensors_of(spec: KernelSpec, shape: Shape, *, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = random_inputs(spec, shape, seed=seed, device="cpu")
    return x.q, x.r, x.k, x.v


def as_a_kernel_rounds(q: Tensor, r: Tensor, k: Tensor, v: Tensor, dtype: str) -> Tensor:
    """Causal Parallax attention of one head in fp32, with p, p·t and o rounded to the input dtype.

    d1 and d2 sum the rounded p and p·t. With tf32 the inputs of matmuls are truncated, and o is not rounded.
    """
    queries, keys = q.shape[0], k.shape[0]
    into_matmul = to_tf32 if dtype == "tf32" else lambda x: x.to(torch_dtype(dtype)).float()
    q, r, k, v = (into_matmul(x.float()) for x in (q, r, k, v))
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)
    s = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(hidden, -math.inf)
    t = r @ k.T
    p = (s - s.amax(dim=-1, keepdim=True)).exp()
    p = into_matmul(p)
    pt = into_matmul(p * t)
    d1, d2 = p.sum(dim=-1, keepdim=True), pt.sum(dim=-1, keepdim=True)
    o1, o2 = p @ v, pt @ v
    return (o1 / d1 * (1 + d2 / d1) - o2 / d1).to(torch_dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_accepts_rounding_and_rejects_a_wrong_row(dtype: str) -> None:
    spec, shape = KernelSpec("forward", 64, dtype, causal=True), Shape(1, 1, 1, 512, 512)
    call = tensors_of(spec, shape, seed=0)
    ref = reference_forward(*call, causal=True).out
    out = as_a_kernel_rounds(*(x[0, :, 0] for x in call), dtype)[None, :, None]
    result = errors(out, ref)
    assert result.relative < tolerance(dtype) / 3
    assert result.worst < 2 * tolerance(dtype)
    assert why_wrong(out, ref, dtype) is None
    assert_close(out, ref, dtype)

    out[0, 300, 0] *= (
        1.25  # one row in 512: in bf16 the total error hides it, and also a mask that is wrong in one place
    )
    with pytest.raises(AssertionError, match=r"1 of 512 rows beyond .* at \(0, 300, 0\)"):
        assert_close(out, ref, dtype)


def test_tf32_results_fail_the_tolerance_of_fp32() -> None:
    spec, shape = KernelSpec("forward", 64, "tf32", causal=True), Shape(1, 1, 1, 512, 512)
    call = tensors_of(spec, shape, seed=0)
    ref = reference_forward(*call, causal=True).out
    out = as_a_kernel_rounds(*(x[0, :, 0] for x in call), "tf32")[None, :, None]
    assert tolerance("fp32") < errors(out, ref).relative < tolerance("tf32")
    assert "allowed for fp32" in str(why_wrong(out, ref, "fp32"))


def test_the_worst_error_is_reported_with_its_index() -> None:
    ref = torch.ones(4, 8)
    out = ref.clone()
    out[2, 5] = 3.0
    assert why_wrong(out, ref, "fp16") == (
        "relative error 0.354 (0.00125 allowed for fp16); 1 of 4 rows beyond 0.00625, the worst, 0.707, at (2,); "
        "largest difference 2 at (2, 5): 3, not 1"
    )
    assert "nan, not 1" in str(why_wrong(ref * math.nan, ref, "fp16"))
    assert "0, not 1" in str(why_wrong(torch.tensor(0.0), torch.tensor(1.0), "bf16"))


def test_the_error_of_a_row_near_zero_is_relative_to_the_other_rows() -> None:
    ref = torch.tensor([[1.0], [1.0], [1e-9]])  # rows of width one, as t̄ has
    assert why_wrong(ref + 1e-6, ref, "bf16") is None
    assert why_wrong(torch.tensor([[1.0], [1e-3]]), torch.tensor([[1.0], [0.0]]), "bf16") is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_inputs(dtype: str) -> None:
    spec, shape = KernelSpec("forward", 128, dtype, group=2), Shape(2, 4, 2, 64, 96)
    call = tensors_of(spec, shape, seed=3)
    assert [tuple(x.shape) for x in call] == [(2, 64, 4, 128)] * 2 + [(2, 96, 2, 128)] * 2
    assert {x.dtype for x in call} == {torch_dtype(dtype)}
    q, r, k, v = call
    for x in (q, k, v):
        assert x.float().std().item() == pytest.approx(1, abs=0.05)
    t = torch.einsum("bihd,bjhd->bhij", r[:, :, :2].double(), k.double())
    assert t.std().item() == pytest.approx(1, abs=0.1)
    for tensor, again, other in zip(
        call, tensors_of(spec, shape, seed=3), tensors_of(spec, shape, seed=4), strict=True
    ):
        assert torch.equal(tensor, again)
        assert not torch.equal(tensor, other)


def test_random_inputs_need_a_shape_that_matches_the_spec() -> None:
    with pytest.raises(ArgumentError, match="1 query heads per kv head; allowed: 4, as the spec has"):
        tensors_of(KernelSpec("forward", 64, "bf16", group=4), Shape(1, 4, 4, 8, 8), seed=0)
    with pytest.raises(ArgumentError, match="seqlen_q 1 for decode"):
        tensors_of(KernelSpec("decode", 64, "bf16"), Shape(1, 4, 4, 8, 8), seed=0)


@pytest.mark.parametrize("of_dtype", [tolerance, torch_dtype])
def test_unknown_dtypes(of_dtype: object) -> None:
    with pytest.raises(ArgumentError, match=r"dtype: got 'fp8'; allowed: bf16, fp16, fp32, tf32\b"):
        of_dtype("fp8")
