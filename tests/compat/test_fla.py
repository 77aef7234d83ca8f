"""The drop-ins for fla on CPU tensors: layouts, conventions, dtypes and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import assert_close
from drop_in_references import causal, check_gradients, expected_of_each, normal, packed
from torch import Tensor

from parallax_gen.compat.fla import naive_parallax, parallax_decode, parallax_decode_one_step, parallel_parallax
from parallax_gen.errors import ArgumentError

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def inputs_of(
    seqlen_q: int = 12,
    seqlen_kv: int = 12,
    *,
    batch: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    kv_heads: int = 2,
) -> list[Tensor]:
    """Leaves (batch, seqlen, heads, head_dim), of 4 query heads."""
    sizes = [(batch, seqlen_q, 4, head_dim)] * 2 + [(batch, seqlen_kv, kv_heads, head_dim)] * 2
    scales = (1, head_dim**-0.5, 1, 1)
    return [normal(*size, dtype=dtype, scale=scale).requires_grad_() for size, scale in zip(sizes, scales, strict=True)]


def check(result: Tensor, expected: Tensor, inputs: list[Tensor], name: str) -> None:
    """The output, and its gradients."""
    assert result.is_contiguous()
    assert result.dtype == inputs[0].dtype
    assert_close(result, expected, name)
    check_gradients(result, expected, inputs, name)


OPTIONS = [{}, {"scale": 0.7}, {"window_size": 1}, {"window_size": 5, "scale": 0.1}, {"window_size": 99}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "kv_heads"), [(torch.bfloat16, 16, 2), (torch.float16, 20, 1), (torch.bfloat16, 60, 4)]
)
def test_parallel_and_naive(dtype: torch.dtype, head_dim: int, kv_heads: int, options: dict[str, Any]) -> None:
    inputs = inputs_of(head_dim=head_dim, dtype=dtype, kv_heads=kv_heads)
    visible = causal(12, 12, options.get("window_size", -1), at_end=True)
    expected = expected_of_each(*inputs, scale=options.get("scale"), visible=visible)[0]
    check(parallel_parallax(*inputs, **options), expected, inputs, NAMES[dtype])
    check(naive_parallax(*inputs, **options), expected, inputs, NAMES[dtype])


@pytest.mark.parametrize("window_size", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("head_dim", [16, 20])
def test_packed_sequences(head_dim: int, dtype: torch.dtype, window_size: int | None) -> None:
    inputs, starts = inputs_of(batch=1, head_dim=head_dim), [0, 5, 5, 6, 12]
    result = parallel_parallax(*inputs, window_size=window_size, cu_seqlens=torch.tensor(starts, dtype=dtype))
    check(result, packed(*inputs, starts, window_size or -1), inputs, "bf16")


def test_naive_without_causal_has_no_window_and_keys_of_any_length() -> None:
    inputs = inputs_of(5, 12, dtype=torch.float32)
    check(naive_parallax(*inputs, window_size=3, causal=False), expected_of_each(*inputs)[0], inputs, "fp32")


def test_autocast_does_not_change_16_bit_inputs() -> None:
    inputs = inputs_of(dtype=torch.float16)
    expected = parallel_parallax(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(parallel_parallax(*inputs), expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seqlen_q", [1, 4, 12])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 16), (torch.float32, 20)])
def test_decode(dtype: torch.dtype, head_dim: int, seqlen_q: int, options: dict[str, Any]) -> None:
    inputs = inputs_of(seqlen_q, 12, dtype=dtype, head_dim=head_dim)
    window = options.get("window_size", -1)
    for starts in (None, torch.tensor([0, 10]), torch.tensor([12, 3], dtype=torch.int32)):
        visible = causal(seqlen_q, 12, window, at_end=True)
        if starts is not None:
            visible = visible & (torch.arange(12) >= starts[:, None, None, None])
        expected = expected_of_each(*inputs, scale=options.get("scale"), visible=visible)[0]
        result = parallax_decode(*inputs, **options, cache_start=starts)
        assert result.is_contiguous()
        assert (result.dtype, result.requires_grad) == (dtype, False)
        assert_close(result, expected, NAMES[dtype])
        if seqlen_q == 1:
            assert torch.equal(parallax_decode_one_step(*inputs, **options, cache_start=starts), result)


def test_one_step_over_an_empty_cache_gives_zeros() -> None:
    assert not parallax_decode_one_step(*inputs_of(1, 0)).any()


def test_any_strides() -> None:
    inputs = [x.detach().mT.contiguous().mT for x in inputs_of()]
    assert torch.equal(parallel_parallax(*inputs), parallel_parallax(*(x.contiguous() for x in inputs)))
    assert torch.equal(parallax_decode(*inputs), parallax_decode(*(x.contiguous() for x in inputs)))


ALL = [parallel_parallax, naive_parallax, parallax_decode, parallax_decode_one_step]


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": normal(2, 1, 3, 16)}, "must be divisible"),
        ({"k": normal(2, 1, 8, 16)}, "must be divisible"),
        ({"k": normal(2, 1, 0, 16)}, "must be divisible"),
        ({"k": normal(1, 1, 2, 16)}, "k: "),
        ({"v": normal(2, 2, 2, 16)}, "v: "),
        ({"r": normal(2, 1, 2, 16)}, "r: "),
        ({"q": normal(2, 4, 16)}, "q: "),
        ({"window_size": 0}, "window_size: "),
    ],
)
def test_mismatched_sizes_are_value_errors(function: Any, change: dict[str, Any], message: str) -> None:
    inputs = dict(zip("qrkv", inputs_of(1, 1), strict=True))
    function(**inputs)
    with pytest.raises(ValueError, match=message) as caught:
        function(**{**inputs, **change})
    assert isinstance(caught.value, ArgumentError)


@pytest.mark.parametrize(
    ("function", "change", "kind", "message"),
    [
        (parallel_parallax, {"q": torch.zeros(1, 1, 4, 16)}, TypeError, "bf16 or fp16"),
        (parallel_parallax, {name: normal(2, 1, 4, 16) for name in "qrkv"}, ValueError, "batch of 1"),
        (parallel_parallax, {"cu_seqlens": torch.zeros(2)}, TypeError, "int32 or int64"),
        (parallel_parallax, {"scale": 0.0}, ValueError, "scale"),
        (parallax_decode, {name: normal(1, 2, 4, 16) for name in "qr"}, AssertionError, "must cover query length"),
        (parallax_decode, {"cache_start": torch.zeros(2)}, ValueError, "cache_start"),
        (parallax_decode, {"v": torch.zeros(1, 1, 2, 16)}, ValueError, "v: "),
        (parallax_decode_one_step, {name: normal(1, 2, 4, 16) for name in "qr"}, ValueError, "2 queries"),
        (naive_parallax, {name: normal(1, 2, 4, 16) for name in "qr"}, ValueError, "k: "),
    ],
)
def test_a_bad_argument_raises_the_same_error_as_in_fla(
    function: Any, change: dict[str, Any], kind: Any, message: str
) -> None:
    inputs = dict(zip("qrkv", inputs_of(1, 1, batch=1), strict=True))
    if function is parallel_parallax:
        inputs["cu_seqlens"] = torch.tensor([0, 1])
    function(**inputs)
    with pytest.raises(kind, match=message) as caught:
        function(**{**inputs, **change})
    assert isinstance(caught.value, ArgumentError)
