"""Rows that give most of their weight to few keys, on a card: errors over those of softmax attention in such rows.

tests/codegen/test_peaked_rows.py measures the same in Triton's interpreter, and gives the reason of each bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from parallax_gen import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.codegen.abi import torch_dtype
from parallax_gen.oracle.accuracy import errors, tolerance
from parallax_gen.oracle.peaked import KINDS, peaked
from parallax_gen.oracle.reference import reference_backward, reference_forward

pytestmark = pytest.mark.gpu

CASES = [(64, "bf16"), (128, "bf16"), (256, "bf16"), (96, "fp16"), (128, "fp16")]
ALIKE = ("twin keys", "six alike")  # several keys of nearly equal t share the weight
# times softmax attention's error
OF_DISTINCT_KEYS, OF_ALIKE_KEYS, OF_LARGE_PROBES = 1.5, 1.6, 1.8


def inputs(
    kind: str, head_dim: int, dtype: str, seqlen: int = 700, *, batch: int = 4, probes: float = 1.0
) -> list[Tensor]:
    """(batch, seqlen, heads, head_dim), of unit variance before rows are peaked: |t| is about probes sqrt(head_dim)."""
    draw = torch.Generator("cuda").manual_seed(1)
    sizes = [(batch, seqlen, heads, head_dim) for heads in (4, 4, 2, 2)]
    q, r, k, v = (torch.randn(size, device="cuda", generator=draw) for size in sizes)
    q, k = peaked(kind, q, k, draw)
    return [x.to(torch_dtype(dtype)) for x in (q, probes * r, k, v)]


def softmax_of_torch(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """torch's causal softmax attention, and the exact one."""
    x = [t.transpose(1, 2) for t in (q, k, v)]
    out = scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True).transpose(1, 2)
    return out, reference_forward(q, torch.zeros_like(q), k, v, causal=True).out


def assert_error(x: list[Tensor], dtype: str, most: float) -> None:
    """The forward's error is at most `most` times that of softmax attention."""
    ours = errors(parallax_attn_func(*x, causal=True), reference_forward(*x, causal=True).out).relative
    # The error of an output's rounding alone is a sixth of the tolerance. Where softmax attention is a row of v almost
    # exactly, it has not even that; Parallax attention is no row of v.
    assert ours <= most * max(errors(*softmax_of_torch(x[0], x[2], x[3])).relative, tolerance(dtype) / 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("head_dim", "dtype"), CASES)
def test_the_forward(kind: str, head_dim: int, dtype: str) -> None:
    assert_error(inputs(kind, head_dim, dtype), dtype, OF_ALIKE_KEYS if kind in ALIKE else OF_DISTINCT_KEYS)


@pytest.mark.parametrize("kind", KINDS)
def test_large_probes(kind: str) -> None:
    assert_error(inputs(kind, 128, "bf16", probes=8), "bf16", OF_LARGE_PROBES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "window_size": 300}, {"causal": True, "softcap": 50.0}], ids=str
)
def test_masks_and_caps(kind: str, options: dict[str, Any]) -> None:
    x = inputs(kind, 128, "bf16")
    expected = reference_forward(*x, **options)
    out, lse, t_mean, v_mean = parallax_attn_func(*x, **options, return_stats=True)
    assert errors(out, expected.out).relative < 3.5e-3
    assert errors(v_mean, expected.v_mean).relative < 3.5e-3
    assert errors(t_mean, expected.t_mean).relative < 3.5e-3
    # With a cap a score of 11 is off by up to 2^-11 of it, as tanh.approx is.
    assert (lse.double() - expected.lse).abs().max() < (1e-2 if "softcap" in options else 1e-3)


@pytest.fixture
def tf32_matmuls() -> Iterator[None]:
    """monkeypatch would delete the attribute, which is not one of the module's __dict__."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("tf32_matmuls")
def test_tf32(kind: str) -> None:
    """Tensor cores truncate q, k and v to 10 bits, which is most of the error: so does the reference here."""
    x = [(t.view(torch.int32) & -0x2000).view(torch.float32) for t in inputs(kind, 64, "fp32")]
    out = parallax_attn_func(*x, causal=True)
    assert errors(out, reference_forward(*x, causal=True).out).relative < 1e-3
    x[0][0, 33, 2] = float("nan")
    out = parallax_attn_func(*x, causal=True)
    assert out[0, 33, 2].isnan().all()
    assert out[0, 32].isfinite().all()


def test_packed_sequences_are_the_dense_ones() -> None:
    x = inputs("twin keys", 128, "bf16", 300, batch=2)
    ends = torch.tensor([0, 300, 600], dtype=torch.int32, device="cuda")
    flat = (t.flatten(0, 1) for t in x)
    packed = parallax_attn_varlen_func(*flat, ends, ends, 300, 300, causal=True)
    expected = reference_forward(*x, causal=True).out
    assert errors(packed.unflatten(0, (2, 300)), expected).relative < 3.5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_as_exact_as_softmax_attentions(kind: str) -> None:
    """dq, dr and dk are small where one key has the weight, and as inexact, relative to their norm, as softmax's dq."""
    x = [t.requires_grad_() for t in inputs(kind, 128, "bf16")]
    q, r, k, v = (t.detach() for t in x)
    out = parallax_attn_func(*x, causal=True)
    do = torch.randn_like(out)
    of_softmax = scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (x[0], x[2], x[3])), is_causal=True, enable_gqa=True
    )
    dq, _, dv = torch.autograd.grad(of_softmax.transpose(1, 2), (x[0], x[2], x[3]), do)
    exact = reference_backward(q, torch.zeros_like(r), k, v, do, causal=True)
    dq_error, dv_error = errors(dq, exact.dq).relative, errors(dv, exact.dv).relative
    expected = reference_backward(q, r, k, v, do, causal=True)
    for name, gradient in zip(("dq", "dr", "dk", "dv"), torch.autograd.grad(out, x, do), strict=True):
        most = 1.2 * dv_error if name == "dv" else 1.5 * dq_error
        assert errors(gradient, getattr(expected, name)).relative <= most + 1e-3, name
