"""Rendered kernels on rows that give most of their weight to one key or to a few, in Triton's CPU interpreter.

The errors are those of a GPU: gpu_arithmetic rounds bf16 as it does. Each is compared with the error of softmax
attention on the same q, k and v, computed as kernels do: p rounded to 16 bits, fp32 sums, the output rounded.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallax_gen.codegen.abi import Inputs
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import render
from parallax_gen.errors import ArgumentError
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.oracle import verify
from parallax_gen.oracle.accuracy import errors
from parallax_gen.oracle.inputs import attend, random_inputs, random_inputs_of, softmax_scale
from parallax_gen.oracle.kvcache import gather_pages
from parallax_gen.oracle.peaked import KINDS
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("gpu_arithmetic"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:triton"),
]

FORWARD = ForwardConfig(BLOCK_M=64, BLOCK_N=64, GROUP_HEADS=1, num_warps=4, num_stages=2)
DECODE = DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=3, merge="last", num_warps=2, num_stages=3)
MULTI_TOKEN = KernelSpec("decode_varlen", 64, "bf16", 4, many_queries=True, causal=True)
CASES = {
    "forward": (KernelSpec("forward", 64, "bf16", 2, causal=True), FORWARD, Shape(1, 2, 1, 384, 384)),
    "fixed reference": (
        KernelSpec("forward", 64, "bf16", 2, causal=True),
        replace(FORWARD, SOFTMAX="fixed_reference"),
        Shape(1, 2, 1, 384, 384),
    ),
    "accurate": (KernelSpec("forward", 64, "bf16", 2, causal=True, accurate=True), FORWARD, Shape(1, 2, 1, 384, 384)),
    "accurate, fixed reference": (
        KernelSpec("forward", 64, "bf16", 2, causal=True, accurate=True),
        replace(FORWARD, SOFTMAX="fixed_reference"),
        Shape(1, 2, 1, 384, 384),
    ),
    "decode": (KernelSpec("decode", 64, "bf16", 4), DECODE, Shape(8, 4, 1, 1, 384)),
    "decode_varlen": (KernelSpec("decode_varlen", 64, "bf16", 4), DECODE, Shape(8, 4, 1, 1, 384)),
    # the last page has 12 keys, the last of them each row's own
    "pages": (KernelSpec("decode_varlen", 64, "bf16", 4, page_size=16), DECODE, Shape(8, 4, 1, 1, 380)),
    "multi-token queries": (MULTI_TOKEN, replace(DECODE, BLOCK_H=16), Shape(2, 4, 1, 6, 384)),
    # the window ends before the first key
    "window": (replace(MULTI_TOKEN, window=True), DECODE, Shape(2, 4, 1, 6, 384, 360)),
    "e4m3": (KernelSpec("decode_varlen", 64, "bf16", 4, cache_dtype="e4m3"), DECODE, Shape(8, 4, 1, 1, 384)),
}


def softmax_attention(spec: KernelSpec, x: Inputs) -> tuple[Tensor, Tensor]:
    """Softmax attention in float64, and with the roundings of a 16-bit kernel. 8-bit keys and values are exact."""
    k, v = (t if x.page_table is None else gather_pages(t, x.page_table) for t in (x.k, x.v))
    if spec.cache_dtype:
        assert x.k_scale is not None
        assert x.v_scale is not None
        k, v = k.double() * x.k_scale.double()[:, None], v.double() * x.v_scale.double()[:, None]
    if x.cache_seqlens is not None:
        length = int(x.cache_seqlens.max())  # that of all sequences
        k, v = k[:, :length], v[:, :length]
    q, k, v = (x.q.double(), *(t.double().repeat_interleave(spec.group, dim=2) for t in (k, v)))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale(spec)
    positions, keys = torch.arange(s.shape[-2])[:, None] + s.shape[-1] - s.shape[-2], torch.arange(s.shape[-1])
    if spec.causal:
        s = s.masked_fill(keys > positions, -torch.inf)
    if spec.window:
        s = s.masked_fill(keys <= positions - x.window_size, -torch.inf)
    p = (s - s.amax(-1, keepdim=True)).exp()
    exact, rounded = (torch.einsum("bhij,bjhd->bihd", w, v) for w in (p, p.to(x.q.dtype).double()))
    total = p.sum(-1).transpose(1, 2)[..., None]
    return exact / total, (rounded / total).to(x.q.dtype)


def output(spec: KernelSpec, config: KernelConfig, x: Inputs) -> Tensor:
    call = verify.poisoned_call(spec, config, x)
    load(render(spec, config, GPUS["h200"])).launch(*call.arguments(softmax_scale(spec)))
    return call.written["out"]


def times_the_error_of_softmax(spec: KernelSpec, config: KernelConfig, shape: Shape, kind: str) -> float:
    x = random_inputs_of(spec, shape, seed=1, device="cpu", full=True, kind=kind)
    exact, rounded = softmax_attention(spec, x)
    ours = errors(output(spec, config, x), attend(spec, x).out).relative
    return ours / errors(rounded, exact).relative


# Kernels round p t to bf16, by up to 2^-8 of its size, which where one key has the weight is |t|, here up to 15,
# times the size of the output. The forward takes a first key in fp32, and a running maximum makes the largest p 1,
# which is exact. Measured: 6.5 with it and 8 with a fixed reference for "own key". Decode rounds p (t - t_mean), which
# is small where p is large. Measured: 0.94 to 1.06 in decode, 1.19 at most in decode_varlen.
LARGEST = {
    "forward": {"normal": 1.3, "first key": 1.3, "own key": 8, "one key": 6, "two keys": 3, "twin keys": 6},
    "fixed reference": {
        "normal": 1.3,
        "first key": 1.3,
        "own key": 10,
        "one key": 8,
        "two keys": 3.5,
        "twin keys": 7.5,
    },
}
OF_OTHER_KINDS = {"forward": 5.0, "fixed reference": 5.5}
OF_EXACT_KERNELS = 1.4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_errors_of_peaked_rows(case: str, kind: str) -> None:
    largest = LARGEST[case].get(kind, OF_OTHER_KINDS[case]) if case in LARGEST else OF_EXACT_KERNELS
    assert times_the_error_of_softmax(*CASES[case], kind) <= largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softmax", ["online", "fixed_reference"])
def test_accurate_statistics_are_of_exact_weights(softmax: str, kind: str) -> None:
    """lse and t_mean, which the backward reads, are not of the rounded p, which is off by up to 2^-8."""
    spec, shape = KernelSpec("forward", 64, "bf16", 2, causal=True, stats=True, accurate=True), Shape(1, 2, 1, 200, 200)
    x = random_inputs_of(spec, shape, seed=1, device="cpu", full=True, kind=kind)
    call = verify.poisoned_call(spec, replace(FORWARD, SOFTMAX=softmax), x)
    source = render(spec, replace(FORWARD, SOFTMAX=softmax), GPUS["h200"])
    load(source).launch(*call.arguments(softmax_scale(spec)))
    expected = attend(spec, x)
    for name in ("lse", "t_mean"):
        assert errors(call.written[name], getattr(expected, name)).relative < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [1, 3])
def test_partial_states_of_decode(splits: int, kind: str) -> None:
    """lse and t_mean, by which partial states are merged, are of exact sums; v_mean is softmax attention."""
    spec, shape = KernelSpec("decode_varlen", 64, "bf16", 4, stats=True), Shape(2, 4, 1, 1, 200)
    config = replace(DECODE, NUM_SPLITS=splits)
    x = random_inputs_of(spec, shape, seed=1, device="cpu", full=True, kind=kind)
    call = verify.poisoned_call(spec, config, x)
    load(render(spec, config, GPUS["h200"])).launch(*call.arguments(softmax_scale(spec)))
    expected = attend(spec, x)
    for name in ("lse", "t_mean"):
        assert errors(call.written[name], getattr(expected, name)).relative < 1e-5, name
    exact, rounded = softmax_attention(spec, x)
    assert errors(call.written["v_mean"], exact).relative <= 1.4 * errors(rounded, exact).relative


def test_rows_have_the_weight_where_their_kind_says() -> None:
    """More than half of it, in more than seven of ten late rows."""
    spec, shape = KernelSpec("forward", 128, "bf16", 2, causal=True), Shape(1, 4, 2, 200, 200)
    keys = {"first key": [0], "one key": [20], "two keys": [20, 140], "twin keys": [20, 21], "six alike": range(20, 26)}
    for kind in (*keys, "own key", "normal"):
        x = random_inputs(spec, shape, seed=3, device="cpu", kind=kind)
        s = torch.einsum("bihd,bjhd->bhij", x.q.float(), x.k.float().repeat_interleave(2, dim=2)) / 128**0.5
        p = s.masked_fill(torch.ones(200, 200, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)[:, :, 150:]
        weight = p.diagonal(150, -2, -1) if kind == "own key" else p[..., list(keys.get(kind, [20]))].sum(-1)
        share = (weight > 0.5).float().mean()
        assert share > 0.7 if kind != "normal" else share == 0, (kind, share)


def test_kinds_and_lengths_are_checked() -> None:
    spec = KernelSpec("decode", 64, "bf16", 1)
    with pytest.raises(ArgumentError, match="kind: got 'twin'; allowed: normal, first key"):
        random_inputs(spec, Shape(1, 1, 1, 1, 64), seed=0, device="cpu", kind="twin")
    with pytest.raises(ArgumentError, match="k: got seqlen_kv 15; allowed: at least 16"):
        random_inputs(spec, Shape(1, 1, 1, 1, 15), seed=0, device="cpu", kind="one key")
