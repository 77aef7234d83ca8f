"""softcap on a card, at Gemma 2's 50 and 30: rows whose many keys share the weight at scores near the cap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import assert_close
from torch import Tensor

from parallax_gen import (
    GraphedDecode,
    merge_states,
    parallax_attn_func,
    parallax_attn_varlen_func,
    parallax_attn_with_kvcache,
)
from parallax_gen.oracle.kvcache import reference_cached_forward
from parallax_gen.oracle.reference import reference_backward, reference_forward

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CASES = [(cap, dtype) for cap in (50.0, 30.0, 1.5) for dtype in DTYPES]


def inputs(dtype: str, softcap: float, seqlen_q: int, seqlen_kv: int) -> list[Tensor]:
    """Scores around half the cap before it, with a standard deviation of 2.5; t of unit variance."""
    draw = torch.Generator("cuda").manual_seed(1)
    sizes = ((seqlen_q, 4), (seqlen_q, 4), (seqlen_kv, 2), (seqlen_kv, 2))
    q, r, k, v = (torch.randn(2, n, heads, 128, device="cuda", generator=draw) for n, heads in sizes)
    q, r = q + softcap / 2 / 128**0.5, r / 128**0.5
    return [x.to(DTYPES[dtype]) for x in (q, r - r.mean(-1, keepdim=True), k + 1, v)]


@pytest.mark.parametrize(("softcap", "dtype"), CASES)
@pytest.mark.parametrize("window", [None, 100])
def test_a_training_step(softcap: float, dtype: str, window: int | None) -> None:
    x = [t.requires_grad_() for t in inputs(dtype, softcap, 500, 500)]
    options: dict[str, Any] = {"causal": True, "window_size": window, "softcap": softcap}
    out = parallax_attn_func(*x, **options)
    do = torch.randn_like(out)
    grads = torch.autograd.grad(out, x, do)
    x = [t.detach() for t in x]
    assert_close(out.detach(), reference_forward(*x, **options).out, dtype)
    target = reference_backward(*x, do, **options)
    for grad, expected in zip(grads, target, strict=True):  # sums of terms that cancel: relative to the whole
        error = (grad.double() - expected).norm() / expected.norm()
        assert error < {"bf16": 2e-2, "fp16": 2.5e-3, "fp32": 5e-5}[dtype], error


@pytest.mark.parametrize(("softcap", "dtype"), CASES)
def test_serving(softcap: float, dtype: str) -> None:
    """One query, a chunk of a prompt, per-sequence lengths, left padding, states of two parts, a graph."""
    q, r, k, v = inputs(dtype, softcap, 9, 700)
    decode_inputs = (q[:, :1], r[:, :1], k, v)
    lengths, pads = (torch.tensor(n, dtype=torch.int32, device="cuda") for n in ([700, 333], [3, 70]))

    def check(got: Tensor, x: tuple[Tensor, ...], **options: Any) -> None:
        assert_close(got, reference_cached_forward(*x, softcap=softcap, **options).out, dtype)

    check(parallax_attn_with_kvcache(*decode_inputs, softcap=softcap), decode_inputs)
    for x, options in ((decode_inputs, {}), ((q, r, k, v), {"causal": True}), (decode_inputs, {"cache_leftpad": pads})):
        options = {"cache_seqlens": lengths, **options}
        check(parallax_attn_with_kvcache(*x, softcap=softcap, **options), x, **options)
    parts = [
        parallax_attn_with_kvcache(*decode_inputs[:2], k[:, part], v[:, part], softcap=softcap, return_state=True)
        for part in (slice(0, 300), slice(300, 700))
    ]
    check(merge_states(*parts).out, decode_inputs)
    check(GraphedDecode(*decode_inputs, cache_seqlens=lengths, softcap=softcap)(), decode_inputs, cache_seqlens=lengths)


@pytest.mark.parametrize("softcap", [50.0, 30.0])
def test_pages_and_eight_bits(softcap: float) -> None:
    q, r, k, v = inputs("bf16", softcap, 1, 640)
    k, v = ((x * 0.25).to(torch.float8_e4m3fn).reshape(80, 16, 2, 128) for x in (k, v))
    options: dict[str, Any] = {
        "page_table": torch.randperm(80, device="cuda").to(torch.int32).reshape(2, 40)[:, :19].contiguous(),
        "cache_seqlens": torch.tensor([300, 17], dtype=torch.int32, device="cuda"),
        "k_scale": 4.0,
        "v_scale": 4.0,
        "softcap": softcap,
    }
    out = parallax_attn_with_kvcache(q, r, k, v, **options)
    assert_close(out, reference_cached_forward(q, r, k, v, **options).out, "bf16")


def test_packed_sequences_are_the_dense_ones() -> None:
    x = inputs("bf16", 30.0, 300, 300)
    ends = torch.tensor([0, 300, 600], dtype=torch.int32, device="cuda")
    packed = parallax_attn_varlen_func(*(t.flatten(0, 1) for t in x), ends, ends, 300, 300, causal=True, softcap=30.0)
    assert_close(packed.unflatten(0, (2, 300)), reference_forward(*x, causal=True, softcap=30.0).out, "bf16")
