"""The drop-ins for parallax-kernel on CPU tensors: layouts, conventions, dtypes and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from assertions import assert_close
from drop_in_references import causal, check_gradients, expected_of_each, normal, packed
from torch import Tensor

from parallax_gen.compat.parallax_kernel import (
    GraphedDecode,
    parallax_attn_with_kvcache,
    parallax_bwd,
    parallax_decode,
    parallax_func,
    parallax_fwd,
    parallax_reference,
    parallax_varlen_func,
)
from parallax_gen.compat.parallax_kernel_triton import parallax_decode as triton_decode
from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.drop_in import parallax_kernel_training
from parallax_gen.oracle.accuracy import gradient_term_sizes

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def heads_first(seqlen_q: int = 12, seqlen_kv: int = 12, *, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Leaves (2, heads, seqlen, 16): 4 query heads over 2."""
    sizes = [(2, 4, seqlen_q, 16)] * 2 + [(2, 2, seqlen_kv, 16)] * 2
    return [
        normal(*size, dtype=dtype, scale=scale).requires_grad_()
        for size, scale in zip(sizes, (1, 0.25, 1, 1), strict=True)
    ]


def swapped(*tensors: Tensor) -> list[Tensor]:
    """From heads first to heads last, and back."""
    return [x.transpose(1, 2) for x in tensors]


def folded(*tensors: Tensor) -> list[Tensor]:
    """(batch * heads, seqlen, head_dim), as the raw kernels take it."""
    return [x.detach().flatten(0, 1) for x in tensors]


WINDOWS = [-1, -7, 1, 5, 12, 100]
LENGTHS = [(12, 12), (7, 12), (1, 12)]


# Training


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_parallax_func_aligns_query_i_with_key_i(lengths: tuple[int, int], window: int) -> None:
    inputs = heads_first(*lengths)
    out = parallax_func(*inputs, window_size_left=window)
    expected = expected_of_each(*swapped(*inputs), visible=causal(*lengths, window, at_end=False))[0].transpose(1, 2)
    assert out.is_contiguous()
    assert out.dtype == torch.bfloat16
    assert_close(out, expected, "bf16")
    check_gradients(out, expected, inputs, "bf16")


def test_parallax_func_with_more_queries_than_keys() -> None:
    inputs = heads_first(12, 7)
    out = parallax_func(*inputs, window_size_left=12)
    expected = expected_of_each(*swapped(*inputs), visible=causal(12, 7, at_end=False))[0].transpose(1, 2)
    assert_close(out, expected, "bf16")
    check_gradients(out, expected, inputs, "bf16")


def test_scales_dtypes_and_strides_of_training() -> None:
    inputs = heads_first(dtype=torch.float16)
    expected = expected_of_each(*swapped(*inputs), scale=0.7, visible=causal(12, 12, at_end=False))[0].transpose(1, 2)
    assert_close(parallax_func(*inputs, 0.7), expected, "fp16")
    strided = [x.mT.contiguous().mT for x in inputs]
    assert torch.equal(parallax_func(*strided, qk_scale=0.7), parallax_func(*inputs, qk_scale=0.7))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(parallax_func(*inputs, 0.7), parallax_func(*inputs, 0.7).half())


def test_parallax_func_compiles_in_one_graph() -> None:
    inputs = heads_first()
    compiled = torch.compile(parallax_func, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs, window_size_left=5), parallax_func(*inputs, window_size_left=5))
    torch._dynamo.reset()


@pytest.mark.parametrize("window", [-1, 5])
@pytest.mark.parametrize("lengths", [*LENGTHS, (12, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_raw_forward_and_backward(lengths: tuple[int, int], window: int, dtype: torch.dtype) -> None:
    window = -1 if lengths == (12, 7) else window
    inputs = heads_first(*lengths, dtype=dtype)
    raw = folded(*inputs)
    result = parallax_fwd(*raw, torch.tensor(0.3), 2, window)
    o, barv, d1, bart, m = result
    assert [x.dtype for x in result] == [dtype, dtype, *[torch.float32] * 3]
    assert all(x.is_contiguous() and not x.requires_grad for x in result)
    assert d1.shape == bart.shape == m.shape == (8, lengths[0], 1)
    expected = expected_of_each(*swapped(*inputs), scale=0.3, visible=causal(*lengths, window, at_end=False))
    of_rows = [x.flatten(0, 1)[..., None] for x in expected[1:3]]
    assert_close(o, expected[0].transpose(1, 2).flatten(0, 1), NAMES[dtype])
    assert_close(barv, expected[3].transpose(1, 2).flatten(0, 1), NAMES[dtype])
    assert_close(d1 * m.exp2(), of_rows[0], "fp32")
    assert_close(bart, of_rows[1], "fp32")
    grad_o = torch.randn_like(o)
    grads = parallax_bwd(*raw, *result, grad_o, 0.3, 2, window)
    assert [x.dtype for x in grads] == [torch.bfloat16] * 4
    do = grad_o.unflatten(0, (2, 4)).transpose(1, 2).double()
    target = torch.autograd.grad(expected[0], inputs, do)
    for grad, want, size in zip(grads, target, gradient_term_sizes(*raw, grad_o, 0.3), strict=True):
        assert grad.is_contiguous()
        assert_close(grad, want.flatten(0, 1).double(), "bf16", float(size))


def test_raw_kernels_take_any_strides() -> None:
    raw = folded(*heads_first())
    strided = [x.mT.contiguous().mT for x in raw]
    result = parallax_fwd(*raw, 0.3, 2)
    results_of_strided = parallax_fwd(*strided, 0.3, 2)
    grad_o = torch.randn_like(result[0])
    result += parallax_bwd(*raw, *result, grad_o, 0.3, 2)
    results_of_strided += parallax_bwd(*strided, *results_of_strided, grad_o.mT.contiguous().mT, 0.3, 2)
    assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(result, results_of_strided, strict=True))


def test_the_backward_accepts_parallax_kernels_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parallax-kernel m is the row's largest score in base 2, and d1 the sum relative to it."""
    inputs = heads_first()
    raw = folded(*inputs)
    o, barv, d1, bart, m = parallax_fwd(*raw, 0.3, 2)
    largest = m - torch.rand_like(m)
    saved: list[Any] = []
    backward = parallax_kernel_training.backward_without_autograd
    monkeypatch.setattr(
        parallax_kernel_training,
        "backward_without_autograd",
        lambda *args, **options: saved.append(args[2]) or backward(*args, **options),
    )
    for d1_and_m in ((d1, m), ((m - largest).exp2(), largest)):
        parallax_bwd(*raw, o, barv, d1_and_m[0], bart, d1_and_m[1], torch.ones_like(o), 0.3, 2)
    whole, t_mean, v_mean = expected_of_each(*swapped(*inputs), scale=0.3, visible=causal(12, 12, at_end=False))[1:]
    for results in saved:
        assert_close(results.lse.exp(), whole.flatten(0, 1).unflatten(0, (4, 2)), "fp32")
        assert_close(results.t_mean, t_mean.flatten(0, 1).unflatten(0, (4, 2)), "fp32")
        assert_close(results.v_mean, v_mean.unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 1), "bf16")
        assert all(x.is_contiguous() for x in (results.out, results.lse, results.t_mean, results.v_mean))


def packed_inputs(batch: int = 1, head_dim: int = 16) -> list[Tensor]:
    sizes = [(batch, 12, 4, head_dim)] * 2 + [(batch, 12, 2, head_dim)] * 2
    return [normal(*size, scale=scale).requires_grad_() for size, scale in zip(sizes, (1, 0.25, 1, 1), strict=True)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.int32, 16), (torch.int64, 20)])
def test_parallax_varlen_func_of_packed_sequences(dtype: torch.dtype, head_dim: int, window: int) -> None:
    inputs, starts = packed_inputs(head_dim=head_dim), [0, 3, 3, 4, 12]
    out = parallax_varlen_func(*inputs, None, window, torch.tensor(starts, dtype=dtype))
    expected = packed(*inputs, starts, window)
    assert out.is_contiguous()
    assert_close(out, expected, "bf16")
    check_gradients(out, expected, inputs, "bf16")


def test_parallax_varlen_func_of_a_batch() -> None:
    inputs = packed_inputs(batch=3)
    out = parallax_varlen_func(*inputs, qk_scale=0.3, window_size_left=5)
    assert_close(out, expected_of_each(*inputs, scale=0.3, visible=causal(12, 12, 5, at_end=True))[0], "bf16")


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_reference_aligns_the_last_query_with_the_last_key(lengths: tuple[int, int], window: int) -> None:
    inputs = swapped(*heads_first(*lengths, dtype=torch.float32))
    out = parallax_reference(*inputs, 0.3, window_size_left=window)
    expected = expected_of_each(*inputs, scale=0.3, visible=causal(*lengths, window, at_end=True))[0]
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    assert_close(out, expected, "fp32")
    check_gradients(out, expected, inputs, "fp32")


def test_the_reference_without_causal() -> None:
    inputs = swapped(*heads_first(5, 12))
    assert_close(parallax_reference(*inputs, -0.3, causal=False), expected_of_each(*inputs, scale=-0.3)[0], "fp32")


# Decoding


def cached(seqlen: int = 9, *, heads: int = 4, kv_heads: int = 2, head_dim: int = 64) -> list[Tensor]:
    rows = [normal(3, 1, heads, head_dim), normal(3, 1, heads, head_dim, scale=0.125)]
    return [*rows, normal(3, seqlen, kv_heads, head_dim), normal(3, seqlen, kv_heads, head_dim)]


def last(seqlen: int, window: int) -> Tensor:
    return causal(1, seqlen, window, at_end=True)


@pytest.mark.parametrize(
    ("window_size", "window"),
    [(None, -1), (-1, -1), ((-1, -1), -1), ((-1, 0), -1), (3, 3), ((3, 0), 3), ([4, None], 4), ((3, -2), 3), (99, 99)],
)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_kvcache_and_its_windows(group: int, window_size: Any, window: int) -> None:
    inputs = cached(heads=2 * group)
    kept = [x.clone() for x in inputs]
    out = parallax_attn_with_kvcache(*inputs, window_size=window_size)
    assert_close(out, expected_of_each(*inputs, visible=last(9, window))[0], "bf16")
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True))  # the cache is not appended to
    decoded = parallax_decode(*inputs, 0.125, window_size_left=window)
    assert torch.equal(decoded, out)


def test_kvcache_attends_to_the_used_keys() -> None:
    q, r, k, v = cached()
    used = torch.tensor([9, 1, 4], dtype=torch.int32)
    expected = [
        expected_of_each(*(x[b : b + 1, :n] for x in (q, r, k, v)), scale=0.2)[0] for b, n in enumerate((9, 1, 4))
    ]
    k[1, 1:] = v[2, 4:] = math.nan
    out = torch.empty_like(q)
    result = parallax_attn_with_kvcache(q, r, k, v, seqused_k=used, scale=0.2, out=out)
    assert result is out
    assert_close(out, torch.cat(expected), "bf16")


def test_kvcache_compiles_to_one_graph() -> None:
    inputs, used = cached(), torch.tensor([9, 1, 4], dtype=torch.int32)
    torch._dynamo.reset()
    call = torch.compile(parallax_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    result = call(*inputs, seqused_k=used, window_size=(3, 0))
    torch._dynamo.reset()
    assert torch.equal(result, parallax_attn_with_kvcache(*inputs, seqused_k=used, window_size=(3, 0)))


def test_decoding_returns_new_tensors_without_gradients() -> None:
    inputs = [x.requires_grad_() for x in cached()]
    first, second = (parallax_attn_with_kvcache(*inputs) for _ in range(2))
    assert not first.requires_grad
    assert first.data_ptr() != second.data_ptr()
    out = torch.empty_like(first)
    assert parallax_decode(*inputs, qk_scale=0.125, out=out) is out
    assert torch.equal(out, first)


@pytest.mark.parametrize("head_dim", [64, 20])
@pytest.mark.parametrize("window", [-1, 1, 4])
def test_the_triton_decode(window: int, head_dim: int) -> None:
    inputs = cached(head_dim=head_dim)
    assert_close(
        triton_decode(*inputs, window_size_left=window), expected_of_each(*inputs, visible=last(9, window))[0], "bf16"
    )
    starts = torch.tensor([0, 3, 9])
    visible = last(9, window) & (torch.arange(9) >= starts[:, None, None, None])
    result = triton_decode(*inputs, 0.3, window_size_left=window, cache_start=starts)
    assert_close(result, expected_of_each(*inputs, scale=0.3, visible=visible)[0], "bf16")


def test_graphed_decode_takes_each_steps_inputs_and_lengths() -> None:
    step = GraphedDecode(3, 4, 9, 64, H_kv=2, window_size=(4, 0), scale=0.3, device="cpu")
    assert step.max_kv_len == 9
    assert step.cache_seqlens.tolist() == [9, 9, 9]
    q, r, k, v = cached()
    for lengths in (9, 2, [1, 5, 9], torch.tensor([3, 4, 5], dtype=torch.int32), None):
        out = step(q=q, r=r, k=k, v=v, cache_seqlens=lengths)
        assert out is step.out
        ends = step.cache_seqlens.tolist()
        parts = [[x[b : b + 1, :n] for x in (q, r, k, v)] for b, n in enumerate(ends)]
        expected = [
            expected_of_each(*part, scale=0.3, visible=last(n, 4))[0] for part, n in zip(parts, ends, strict=True)
        ]
        assert_close(out, torch.cat(expected), "bf16")
    assert ends == [3, 4, 5]
    step.cache_seqlens.fill_(7)
    step.q.neg_()
    assert_close(step.replay(), expected_of_each(-q, r, k[:, :7], v[:, :7], scale=0.3, visible=last(7, 4))[0], "bf16")


def test_graphed_decode_of_a_fixed_length() -> None:
    step = GraphedDecode(3, 4, kv_len=9, head_dim=64, dtype=torch.float16, device="cpu", warmup=0)
    assert step.cache_seqlens is None
    inputs = [x.half() for x in cached(kv_heads=4)]
    out = step(**dict(zip("qrkv", inputs, strict=True)), cache_seqlens=3)  # ignored for a fixed length
    assert_close(out, expected_of_each(*inputs)[0], "fp16")


# Errors


BF16 = torch.zeros(3, 1, 4, 64, dtype=torch.bfloat16)
INT32 = {"dtype": torch.int32}

TRAINING = [
    ({"q": torch.zeros(2, 4, 12, 16)}, TypeError, "bf16 or fp16"),
    ({"q": 3}, TypeError, "a tensor"),
    ({"r": None}, TypeError, "a tensor"),
    ({"k": normal(2, 3, 12, 16)}, ValueError, "must be divisible"),
    ({"k": normal(2, 0, 12, 16)}, ValueError, "must be divisible"),
    ({"k": normal(1, 2, 12, 16)}, ValueError, r"\(2, heads, seqlen, 16\)"),
    ({"r": normal(2, 4, 11, 16)}, ValueError, "q's shape"),
    ({"v": normal(2, 2, 12, 8)}, ValueError, "the shape of k"),
    ({"v": normal(2, 2, 12, 16).half()}, ValueError, "as q has"),
    ({"q": normal(2, 12, 16)}, ValueError, "4 dimensions"),
    ({"qk_scale": 0.0}, ValueError, "qk_scale"),
    ({"window_size_left": 0}, ValueError, "window_size_left"),
    ({"window_size_left": 2.0}, TypeError, "window_size_left"),
    ({"k": normal(2, 2, 7, 16), "v": normal(2, 2, 7, 16), "window_size_left": 8}, ValueError, "window_size_left"),
]
PACKED = [
    ({"q": torch.zeros(1, 12, 4, 16)}, TypeError, "bf16 or fp16"),
    ({"k": normal(1, 12, 3, 16)}, ValueError, "must be divisible"),
    ({"k": normal(1, 11, 2, 16)}, ValueError, r"\(1, 12, heads, 16\)"),
    ({name: normal(2, 12, 4, 16) for name in "qrkv"}, ValueError, "batch of 1"),
    ({"cu_seqlens": torch.tensor([0.0, 12])}, TypeError, "int32 or int64"),
    ({"cu_seqlens": torch.tensor([[0, 12]])}, ValueError, "cu_seqlens"),
    ({"cu_seqlens": torch.tensor([0, 12], device="meta")}, ValueError, "cu_seqlens"),
]
CACHED = [
    ({"page_table": torch.zeros(3, 8, **INT32)}, NotImplementedError, "[Pp]aged"),
    ({"k_cache": normal(3, 9, 6, 64)}, ValueError, "must be divisible"),
    (dict(zip(("q", "r"), [normal(3, 1, 6, 64)] * 2, strict=True)), NotImplementedError, "pack_n"),
    ({"q": BF16.float()}, AssertionError, "bf16 or fp16"),
    ({"q": 3}, TypeError, "a tensor"),
    ({"q": BF16.mT.contiguous().mT}, AssertionError, "contiguous"),
    ({"q": normal(3, 2, 4, 64)}, AssertionError, "1, heads"),
    ({"r": normal(3, 1, 2, 64)}, AssertionError, "q's shape"),
    ({"k_cache": normal(2, 9, 2, 64)}, AssertionError, "k_cache"),
    ({"v_cache": normal(3, 8, 2, 64)}, AssertionError, "v_cache"),
    ({"v_cache": normal(3, 9, 2, 64).half()}, ValueError, "v_cache"),
    ({"out": BF16[:1]}, AssertionError, "out"),
    ({"out": BF16.half()}, AssertionError, "out"),
    ({"scale": -1}, ValueError, "scale"),
    ({"window_size": (3, 4)}, ValueError, "right"),
    ({"window_size": (3, 0, 0)}, ValueError, "pair"),
    ({"window_size": "no"}, ValueError, "window_size"),
    ({"window_size": 0}, ValueError, "window_size"),
    ({"seqused_k": torch.ones(3, dtype=torch.int64)}, TypeError, "int32"),
    ({"seqused_k": 5}, TypeError, "int32"),
    ({"seqused_k": torch.ones(1, **INT32)}, ValueError, "seqused_k must have shape"),
    ({"seqused_k": torch.tensor([1, 10, 1], **INT32)}, ValueError, r"exceeds k_cache\.shape"),
    ({"seqused_k": torch.tensor([1, 0, 1], **INT32)}, ValueError, "values < 1"),
    ({"seqused_k": torch.ones(3, **INT32, device="meta")}, ValueError, "where q is"),
]
GRAPHED = [
    ({"max_kv_len": None}, ValueError, "max_kv_len"),
    ({"kv_len": 9}, ValueError, "exactly one"),
    ({"H_kv": 3}, ValueError, "H_kv"),
    ({"H": 6}, NotImplementedError, "pack_n"),
    ({"head_dim": 96}, AssertionError, "64 or 128"),
    ({"dtype": torch.float32}, AssertionError, "bf16 or fp16"),
    ({"window_size": (1, 1)}, ValueError, "right"),
]
RAW = [
    ({"n_rep": 3}, AssertionError, "n_rep"),
    ({"n_rep": 1}, AssertionError, "k"),
    ({"q": normal(2, 4, 12, 16)}, ValueError, "3 dimensions"),
    ({"v": normal(4, 11, 16)}, ValueError, "the shape of k"),
    ({"qk_scale": math.inf}, ValueError, "qk_scale"),
]


def arguments_of(function: Any) -> dict[str, Any]:
    """Valid arguments for the function."""
    if function is parallax_attn_with_kvcache:
        return dict(zip(("q", "r", "k_cache", "v_cache"), cached(), strict=True))
    if function is GraphedDecode:
        return {"B": 3, "H": 4, "max_kv_len": 9, "head_dim": 64, "H_kv": 2, "device": "cpu"}
    if function is parallax_fwd:
        return {**dict(zip("qrkv", folded(*heads_first()), strict=True)), "qk_scale": 0.3, "n_rep": 2}
    if function is parallax_varlen_func:
        return {**dict(zip("qrkv", packed_inputs(), strict=True)), "cu_seqlens": torch.tensor([0, 12])}
    return dict(zip("qrkv", heads_first(), strict=True))


@pytest.mark.parametrize(
    ("function", "change", "kind", "message"),
    [
        (function, *case)
        for function, cases in (
            (parallax_func, TRAINING),
            (parallax_varlen_func, PACKED),
            (parallax_attn_with_kvcache, CACHED),
            (GraphedDecode, GRAPHED),
            (parallax_fwd, RAW),
        )
        for case in cases
    ],
)
def test_a_bad_argument_raises_the_same_error_as_in_parallax_kernel(
    function: Any, change: dict[str, Any], kind: Any, message: str
) -> None:
    inputs = arguments_of(function)
    function(**inputs)
    with pytest.raises(kind, match=message) as caught:
        function(**{**inputs, **change})
    assert isinstance(caught.value, ArgumentError)


@pytest.mark.parametrize("lengths", [0, -1, 10, [1, 10, 1], torch.tensor([1, 0, 1], dtype=torch.int32)])
def test_a_step_with_an_impossible_length_is_refused(lengths: Any) -> None:
    step = GraphedDecode(3, 4, 9, 64, device="cpu")
    with pytest.raises(ValueError, match="out of range"):
        step(cache_seqlens=lengths)
    assert step.cache_seqlens.tolist() == [9, 9, 9]


def test_the_references_window_must_be_causal() -> None:
    with pytest.raises(ValueError, match="window_size_left"):
        parallax_reference(*swapped(*heads_first()), 0.3, causal=False, window_size_left=3)


@pytest.mark.parametrize("name", ["o", "barv", "d1", "bart", "m", "grad_o"])
def test_a_backward_with_another_forwards_tensors_is_refused(name: str) -> None:
    raw = folded(*heads_first())
    inputs = dict(zip(("o", "barv", "d1", "bart", "m"), parallax_fwd(*raw, 0.3, 2), strict=True))
    inputs["grad_o"] = torch.ones_like(inputs["o"])
    with pytest.raises(ArgumentError, match=name):
        parallax_bwd(*raw, **{**inputs, name: inputs[name][:, 1:]}, qk_scale=0.3, n_rep=2)
