"""The public functions for dense and packed sequences without a GPU: accepted and refused arguments, CPU results."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from assertions import assert_close
from torch import Tensor

from parallax_gen import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.errors import ArgumentError
from parallax_gen.oracle.reference import reference_forward, reference_varlen_forward
from parallax_gen.runtime import kvcache  # noqa: F401 - registers its operators
from parallax_gen.runtime.requests import CacheRequest, Request

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")


def normal(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def dense() -> dict[str, Any]:
    """Arguments of parallax_attn_func."""
    return {"q": normal(2, 5, 4, 64), "r": normal(2, 5, 4, 64) / 8, "k": normal(2, 7, 2, 64), "v": normal(2, 7, 2, 64)}


def packed() -> dict[str, Any]:
    """Arguments of parallax_attn_varlen_func: sequences of 2, 0 and 3 queries, and 3, 1 and 3 keys."""
    return {
        "q": normal(5, 4, 64),
        "r": normal(5, 4, 64) / 8,
        "k": normal(7, 2, 64),
        "v": normal(7, 2, 64),
        "cu_seqlens_q": torch.tensor([0, 2, 2, 5], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 3, 4, 7], dtype=torch.int32),
        "max_seqlen_q": 3,
        "max_seqlen_k": 3,
    }


def test_dense_sequences_agree_with_the_reference_and_its_statistics() -> None:
    inputs = dense()
    out, lse, t_mean, v_mean = parallax_attn_func(**inputs, causal=True, softmax_scale=0.3, return_stats=True)
    expected = reference_forward(**inputs, causal=True, softmax_scale=0.3)
    for result, target in zip((out, lse, t_mean, v_mean), expected, strict=True):
        assert_close(result, target, "fp32")
    assert out.dtype == torch.float32
    assert lse.shape == t_mean.shape == (2, 4, 5)


@pytest.mark.parametrize("window_size", [1, 3, 6])
def test_a_window_keeps_the_last_keys(window_size: int) -> None:
    inputs = dense()
    out = parallax_attn_func(**inputs, causal=True, window_size=window_size)
    assert_close(out, reference_forward(**inputs, causal=True, window_size=window_size).out, "fp32")
    assert (out - parallax_attn_func(**inputs, causal=True)).abs().max() > 0.01


@pytest.mark.parametrize("window_size", [7, 8, 10**9])
def test_a_window_of_all_keys_has_no_effect(window_size: int) -> None:
    inputs = dense()
    windowed = parallax_attn_func(**inputs, causal=True, window_size=window_size)
    assert torch.equal(windowed, parallax_attn_func(**inputs, causal=True))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window_size": 2, "softmax_scale": 0.3}])
def test_packed_sequences_agree_with_the_reference_and_its_statistics(options: dict[str, Any]) -> None:
    inputs = packed()
    result = parallax_attn_varlen_func(**inputs, **options, return_stats=True)
    del inputs["max_seqlen_q"], inputs["max_seqlen_k"]
    for x, expected in zip(result, reference_varlen_forward(**inputs, **options), strict=True):
        assert_close(x, expected, "fp32")
    assert result[1].shape == result[2].shape == (4, 5)


def test_without_queries_or_keys_packed_sequences_give_zeros() -> None:
    inputs = packed()
    none, zeros = torch.zeros(0, 2, 64), torch.zeros(4, dtype=torch.int32)
    out = parallax_attn_varlen_func(**{**inputs, "k": none, "v": none, "cu_seqlens_k": zeros, "max_seqlen_k": 0})
    assert torch.equal(out, torch.zeros(5, 4, 64))
    no_batch = {"cu_seqlens_q": zeros[:1], "cu_seqlens_k": zeros[:1], "max_seqlen_q": 0, "max_seqlen_k": 0}
    empty = {"q": torch.zeros(0, 4, 64), "r": torch.zeros(0, 4, 64), "k": none, "v": none}
    assert parallax_attn_varlen_func(**empty, **no_batch).shape == (0, 4, 64)


def test_out_is_written_and_returned() -> None:
    inputs = dense()
    out = torch.full((2, 5, 4, 64), float("nan"))
    assert parallax_attn_func(**inputs, softmax_scale=0.3, out=out) is out
    assert_close(out, reference_forward(**inputs, softmax_scale=0.3).out, "fp32")


def test_no_queries_give_an_empty_output_and_no_keys_give_zeros() -> None:
    inputs = dense()
    empty = parallax_attn_func(inputs["q"][:, :0], inputs["r"][:, :0], inputs["k"], inputs["v"])
    assert empty.shape == (2, 0, 4, 64)
    out, lse, t_mean, v_mean = parallax_attn_func(
        inputs["q"], inputs["r"], inputs["k"][:, :0], inputs["v"][:, :0], return_stats=True
    )
    assert not out.any()
    assert not t_mean.any()
    assert not v_mean.any()
    assert torch.equal(lse, torch.full((2, 4, 5), -torch.inf))


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"q": 3}, "q"),
        ({"q": torch.zeros(2, 4, 64)}, "q"),
        ({"q": torch.zeros(2, 5, 4, 64, dtype=torch.int32)}, "q"),
        ({"r": torch.zeros(2, 5, 2, 64)}, "r"),
        ({"r": torch.zeros(2, 5, 4, 64, dtype=torch.float16)}, "r"),
        ({"k": torch.zeros(2, 7, 3, 64)}, "k"),
        ({"k": torch.zeros(1, 7, 2, 64)}, "k"),
        ({"k": torch.zeros(2, 7, 64, 2).transpose(2, 3)}, "k"),
        ({"k": torch.zeros(2, 7, 2, 64, device="meta")}, "k"),
        ({"v": torch.zeros(2, 8, 2, 64)}, "v"),
        ({"v": None}, "v"),
        ({"v": torch.empty(2**24 * 6 + 64).as_strided((2, 7, 2, 64), (0, 2**24, 0, 1))}, "v"),
        ({"softmax_scale": 0.0}, "softmax_scale"),
        ({"softmax_scale": float("nan")}, "softmax_scale"),
        ({"softmax_scale": "1"}, "softmax_scale"),
        ({"causal": 2}, "causal"),
        ({"q": torch.zeros(2, 5, 4, 64, dtype=torch.float64)}, "q"),
        ({"q": torch.zeros(2, 5, 4, 64).expand(2, 5, 4, 64).transpose(2, 3)}, "q"),
        ({"softmax_scale": -1}, "softmax_scale"),
        ({"return_stats": 1}, "return_stats"),
        ({"recompute_v_mean": None}, "recompute_v_mean"),
        ({"window_size": 3}, "window_size"),
        ({"causal": True, "window_size": 0}, "window_size"),
        ({"causal": True, "window_size": True}, "window_size"),
        ({"causal": True, "window_size": 2.0}, "window_size"),
        ({"causal": True, "window_size": (2, 0)}, "window_size"),
        ({"out": torch.zeros(2, 5, 4, 32)}, "out"),
        ({"out": 1}, "out"),
    ],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_bad_argument_is_named(change: dict[str, Any], argument: str, gradients: bool) -> None:
    inputs = dense()
    inputs["v"].requires_grad_(gradients)
    with pytest.raises(ArgumentError, match=r"got .*; allowed: ") as caught:
        parallax_attn_func(**{**inputs, **change})
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"q": torch.zeros(1, 5, 4, 64)}, "q"),
        ({"r": torch.zeros(5, 2, 64)}, "r"),
        ({"k": torch.zeros(7, 3, 64)}, "k"),
        ({"k": torch.zeros(7, 2, 32)}, "k"),
        ({"v": torch.zeros(6, 2, 64)}, "v"),
        ({"cu_seqlens_q": None}, "cu_seqlens_q"),
        ({"cu_seqlens_k": None}, "cu_seqlens_k"),
        ({"cu_seqlens_q": None, "cu_seqlens_k": None}, "cu_seqlens_q"),
        ({"cu_seqlens_q": [0, 2, 2, 5]}, "cu_seqlens_q"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 2, 5])}, "cu_seqlens_q"),
        ({"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens_q"),
        ({"cu_seqlens_k": torch.tensor([0, 7], dtype=torch.int32)}, "cu_seqlens_k"),
        ({"cu_seqlens_k": torch.zeros(4, 1, dtype=torch.int32)}, "cu_seqlens_k"),
        ({"cu_seqlens_k": torch.zeros(8, dtype=torch.int32)[::2]}, "cu_seqlens_k"),
        ({"max_seqlen_q": -1}, "max_seqlen_q"),
        ({"max_seqlen_q": torch.tensor(3)}, "max_seqlen_q"),
        ({"max_seqlen_k": None}, "max_seqlen_k"),
        ({"max_seqlen_k": 3.0}, "max_seqlen_k"),
        ({"window_size": 2}, "window_size"),
        ({"out": torch.zeros(5, 2, 64)}, "out"),
    ],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_bad_argument_of_packed_sequences_is_named(change: dict[str, Any], argument: str, gradients: bool) -> None:
    inputs = packed()
    inputs["v"].requires_grad_(gradients)
    with pytest.raises(ArgumentError, match=r"got .*; allowed: ") as caught:
        parallax_attn_varlen_func(**{**inputs, **change})
    assert caught.value.argument == argument


@pytest.mark.parametrize("head_dim", [8, 72, 256])
def test_head_dims(head_dim: int) -> None:
    q, k = normal(1, 3, 2, head_dim), normal(1, 3, 1, head_dim)
    assert_close(parallax_attn_func(q, q / 8, k, k), reference_forward(q, q / 8, k, k).out, "fp32")


@pytest.mark.parametrize("head_dim", [0, 4, 60, 264])
def test_the_error_for_an_unsupported_head_dim_lists_supported_ones(head_dim: int) -> None:
    x = torch.zeros(1, 3, 2, head_dim)
    with pytest.raises(ArgumentError, match=f"q: got head_dim {head_dim}; allowed: a multiple of 8 from 8 to 256"):
        parallax_attn_func(x, x, x, x)


def test_inputs_that_require_grad_are_accepted_without_recording() -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in dense().items()}
    with torch.no_grad():
        out = parallax_attn_func(**inputs)
    assert torch.isfinite(out).all()
    assert not out.requires_grad


def test_cpu_tensors_warn_once() -> None:
    program = """
import torch, warnings
from parallax_gen import parallax_attn_func
x = torch.randn(1, 3, 2, 64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    parallax_attn_func(x, x, x, x)
    parallax_attn_func(x, x, x[:, :2], x[:, :2])
print(len([w for w in caught if "CPU tensors" in str(w.message)]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("operators", "request_type"),
    [
        (("attention", "attention_with_stats", "attention_backward"), Request),
        (("attention_with_kvcache", "attention_with_kvcache_state"), CacheRequest),
    ],
)
def test_operator_arguments_are_in_the_order_of_the_request(operators: tuple[str, ...], request_type: Any) -> None:
    for name in operators:
        schema = getattr(torch.ops.parallax_gen, name).default._schema
        names = [argument.name for argument in schema.arguments]
        assert tuple(names[: len(request_type._fields)]) == request_type._fields
