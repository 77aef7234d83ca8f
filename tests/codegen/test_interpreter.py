"""Rendered kernels in Triton's CPU interpreter, against the fp64 oracle.

gpu_arithmetic corrects the interpreter's bf16. tests/gpu runs the same on a card.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreter_cases import DECODE, DKDV, DQDR, FORWARD, GPU, inputs_of
from strategies import Case
from torch.nn.functional import scaled_dot_product_attention

from parallax_gen.codegen.abi import Call, Inputs
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import render
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.preprocess import PreprocessConfig
from parallax_gen.oracle import verify
from parallax_gen.oracle.accuracy import errors, tolerance, why_wrong
from parallax_gen.oracle.inputs import softmax_scale
from parallax_gen.oracle.reference import reference_forward
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

# For a row without keys the kernels divide by zero and take log2(0). The GPU is silent, the interpreter warns.
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("gpu_arithmetic"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:triton"),
]

DTYPES = ("bf16", "fp16", "fp32")
MOST_PROGRAMS = 32

FORWARD_FP32 = replace(FORWARD, BLOCK_M=32)  # smaller tiles, since fp32 uses no tensor cores


def why_kernel_wrong(spec: KernelSpec, config: KernelConfig, shape: Shape, seed: int = 1) -> str | None:
    return verify.check(render(spec, config, GPU), spec, config, shape, seed=seed, device="cpu").wrong


def why_wrong_on(spec: KernelSpec, config: KernelConfig, inputs: Inputs) -> str | None:
    return verify.launch_and_check(render(spec, config, GPU), spec, config, inputs, verify.oracle(spec, inputs)).wrong


def launched(spec: KernelSpec, config: KernelConfig, inputs: Inputs) -> Call:
    """Launch once and return the call."""
    call = verify.poisoned_call(spec, config, inputs)
    load(render(spec, config, GPU)).launch(*call.arguments(softmax_scale(spec)))
    return call


@strategies.examples(30)
@given(case=strategies.cases("forward", DTYPES, GPU, MOST_PROGRAMS))
def test_any_forward_kernel_agrees_with_the_oracle(case: Case) -> None:
    assert why_kernel_wrong(case.spec, case.config, case.shape, case.seed) is None


@strategies.examples(15)
@given(data=st.data())
@pytest.mark.parametrize("op", ["decode", "decode_varlen"])
def test_any_decode_kernel_agrees_with_the_oracle(op: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(op, DTYPES, GPU, MOST_PROGRAMS))
    assert why_kernel_wrong(case.spec, case.config, case.shape, case.seed) is None


@strategies.examples(12)
@given(data=st.data())
@pytest.mark.parametrize("op", ["preprocess", "dkdv", "dqdr"])
def test_any_backward_kernel_agrees_with_the_oracle(op: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(op, DTYPES, GPU, MOST_PROGRAMS // 2))
    assert why_kernel_wrong(case.spec, case.config, case.shape, case.seed) is None


@pytest.mark.parametrize("op", ["forward", "decode", "decode_varlen", "dkdv", "dqdr"])
@strategies.examples(6)
@given(data=st.data())
def test_the_config_does_not_change_the_result(op: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(op, ["fp32"], GPU, MOST_PROGRAMS // 2))
    other = data.draw(strategies.configs(case.spec, GPU))
    inputs = inputs_of(case.spec, case.shape, case.seed)
    one, two = (launched(case.spec, config, inputs).written for config in (case.config, other))
    for name, found in one.items():
        size = found.numel() ** 0.5  # gradients may be pure rounding error
        seen = found.isfinite()  # lse is -inf for a row without keys
        difference = (found - two[name])[seen].norm()
        assert (found == two[name])[~seen].all(), name
        assert difference <= tolerance("fp32") / 10 * max(float(two[name][seen].norm()), size), name


@pytest.mark.parametrize("head_group", [1, 2, 8, 0])
@pytest.mark.parametrize("causal", [False, True])
def test_every_order_of_tiles_covers_every_tile(causal: bool, head_group: int) -> None:
    spec = KernelSpec("forward", 64, "fp16", group=3, causal=causal, stats=True)
    shape = Shape(batch=1, heads=9, kv_heads=3, seqlen_q=70, seqlen_kv=75)  # 9 heads: the last group of 2 or 8 is 1
    assert why_kernel_wrong(spec, replace(FORWARD, GROUP_HEADS=head_group), shape) is None


@pytest.mark.parametrize("stats", [False, True])
def test_rows_that_see_no_key_are_zero(stats: bool) -> None:
    spec = KernelSpec("forward", 64, "fp16", causal=True, stats=stats)
    shape = Shape(batch=1, heads=2, kv_heads=2, seqlen_q=100, seqlen_kv=33)
    inputs = inputs_of(spec, shape)
    assert why_wrong_on(spec, FORWARD, inputs) is None
    call = launched(spec, FORWARD, inputs)
    assert (call.out[:, :67] == 0).all()  # row i sees keys up to i - 67
    assert (call.out[:, 67:] != 0).any(dim=-1).all()
    if stats:
        lse, t_mean, v_mean = (call.written[name] for name in ("lse", "t_mean", "v_mean"))
        assert (lse[..., :67] == -torch.inf).all()
        assert lse[..., 67:].isfinite().all()
        assert (t_mean[..., :67] == 0).all()
        assert (v_mean[:, :67] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (KernelSpec("forward", 64, "fp16", stats=True), FORWARD),
        (KernelSpec("forward", 64, "fp16", causal=True), FORWARD),
        (KernelSpec("decode", 64, "fp16"), DECODE),
    ],
    ids=["full", "causal", "decode"],
)
def test_a_single_key_gives_its_value(spec: KernelSpec, config: KernelConfig, dtype: str) -> None:
    spec = replace(spec, dtype=dtype)
    if (config, dtype) == (FORWARD, "fp32"):
        config = FORWARD_FP32
    inputs = inputs_of(spec, Shape(batch=1, heads=1, kv_heads=1, seqlen_q=1, seqlen_kv=1))
    assert why_wrong(launched(spec, config, inputs).out, inputs.v.double(), dtype) is None


# The merge reads S_PAD rows of partials at once, or in chunks of 64 * 32 * warps / head_dim. "kernel" has 4 warps.
@pytest.mark.parametrize(
    ("splits", "merge", "warps"),
    [
        pytest.param(1, "none", 1, id="none"),
        pytest.param(4, "last", 1, id="last, all at once"),
        pytest.param(6, "last", 2, id="last, all at once, padded"),
        pytest.param(32, "last", 1, id="last, chunks"),
        pytest.param(24, "last", 1, id="last, chunks, padded"),
        pytest.param(4, "kernel", 1, id="kernel, all at once"),
        pytest.param(6, "kernel", 2, id="kernel, all at once, padded"),
        pytest.param(128, "kernel", 1, id="kernel, chunks"),
        pytest.param(96, "kernel", 1, id="kernel, chunks, padded"),
    ],
)
@pytest.mark.parametrize("keys", [3, 530])
def test_every_merge_strategy(splits: int, merge: str, warps: int, keys: int) -> None:
    """With 3 keys most splits are empty, with 530 few."""
    spec = KernelSpec("decode", 128, "fp16", group=2)
    config = DecodeConfig(16, 8, splits, merge, num_warps=warps, num_stages=2)
    assert why_kernel_wrong(spec, config, Shape(batch=1, heads=2, kv_heads=1, seqlen_q=1, seqlen_kv=keys)) is None


@pytest.mark.parametrize("merge", ["none", "last", "kernel"])
@pytest.mark.parametrize("block_h", [8, 16])
def test_a_group_that_does_not_fill_its_tiles(block_h: int, merge: str) -> None:
    """12 heads fill one and a half tiles of 8, or three quarters of a tile of 16."""
    spec = KernelSpec("decode", 64, "fp16", group=12)
    config = replace(DECODE, BLOCK_H=block_h, NUM_SPLITS=1 if merge == "none" else 3, merge=merge)
    assert why_kernel_wrong(spec, config, Shape(batch=2, heads=24, kv_heads=2, seqlen_q=1, seqlen_kv=101)) is None


@pytest.mark.parametrize("splits", [1, 3])
def test_length_zero_and_nan_past_the_end(splits: int) -> None:
    spec = KernelSpec("decode_varlen", 64, "fp16", group=2)
    config = replace(DECODE, NUM_SPLITS=splits)
    inputs = inputs_of(replace(spec, op="decode"), Shape(batch=4, heads=4, kv_heads=2, seqlen_q=1, seqlen_kv=77))
    inputs.cache_seqlens = torch.tensor([0, 1, 40, 77], dtype=torch.int32)
    for sequence, length in enumerate(inputs.cache_seqlens.tolist()):
        inputs.k[sequence, length:] = float("nan")
        inputs.v[sequence, length:] = float("nan")
    assert why_wrong_on(spec, config, inputs) is None
    assert (launched(spec, config, inputs).out[0] == 0).all()


@pytest.mark.parametrize("op", ["full", "causal", "decode"])
def test_without_probes_it_is_softmax_attention(op: str) -> None:
    if op == "decode":
        spec, config = KernelSpec("decode", 64, "fp32", group=2), DECODE
        shape = Shape(batch=2, heads=4, kv_heads=2, seqlen_q=1, seqlen_kv=75)
    else:
        spec, config = KernelSpec("forward", 64, "fp32", group=2, causal=op == "causal", stats=True), FORWARD_FP32
        shape = Shape(batch=2, heads=4, kv_heads=2, seqlen_q=75, seqlen_kv=75)
    inputs = inputs_of(spec, shape)
    inputs.r.zero_()
    call = launched(spec, config, inputs)
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    softmax = scaled_dot_product_attention(q, k, v, is_causal=spec.causal, enable_gqa=True).transpose(1, 2)
    assert why_wrong(call.out, softmax.double(), spec.dtype) is None
    if spec.stats:
        assert torch.equal(call.out, call.written["v_mean"])  # bitwise equal to v_mean


@pytest.mark.parametrize("softmax_scale", [0.02, 1.0])
@pytest.mark.parametrize("op", ["forward", "decode"])
def test_the_softmax_scale_is_an_argument(op: str, softmax_scale: float) -> None:
    spec, config = (KernelSpec(op, 64, "fp32"), FORWARD_FP32 if op == "forward" else DECODE)
    shape = Shape(batch=1, heads=2, kv_heads=2, seqlen_q=20 if op == "forward" else 1, seqlen_kv=75)
    inputs = inputs_of(spec, shape)
    call = verify.poisoned_call(spec, config, inputs)
    load(render(spec, config, GPU)).launch(*call.arguments(softmax_scale))
    expected = reference_forward(inputs.q, inputs.r, inputs.k, inputs.v, softmax_scale=softmax_scale)
    assert why_wrong(call.out, expected.out, spec.dtype) is None


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("op", ["forward", "decode"])
def test_scores_far_from_zero(op: str, sign: float) -> None:
    """Scores of about ±1000: without subtracting the maximum, e^1000 overflows and e^-1000 is 0."""
    spec, config = (KernelSpec(op, 64, "fp32"), FORWARD_FP32 if op == "forward" else DECODE)
    shape = Shape(batch=1, heads=2, kv_heads=2, seqlen_q=20 if op == "forward" else 1, seqlen_kv=75)
    inputs = inputs_of(spec, shape)
    inputs.q[..., 0] = 1024.0
    inputs.k[..., 0] = 8.0 * sign  # shifts q.k / 8 by exactly ±1024
    # A score near 1000 is rounded to 2^-14: the error comes from that, not from the kernel.
    assert errors(launched(spec, config, inputs).out, verify.oracle(spec, inputs)["out"]).relative < 1e-3


@pytest.mark.parametrize("layout", strategies.LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(
    ("spec", "config", "shape"),
    [
        (KernelSpec("forward", 64, "fp16", group=2, causal=True, stats=True), FORWARD, Shape(2, 4, 2, 75, 75)),
        (KernelSpec("forward", 64, "fp16", group=2), FORWARD, Shape(2, 4, 2, 71, 95)),
        (KernelSpec("decode", 64, "fp16", group=2), DECODE, Shape(2, 4, 2, 1, 75)),
        (KernelSpec("decode_varlen", 64, "fp16", group=2), DECODE, Shape(2, 4, 2, 1, 75)),
    ],
    ids=["causal", "full", "decode", "decode_varlen"],
)
def test_strided_inputs(spec: KernelSpec, config: KernelConfig, shape: Shape, layout: object) -> None:
    assert why_wrong_on(spec, config, layout(inputs_of(spec, shape, seed=2))) is None


@pytest.mark.parametrize("merge", ["none", "last", "kernel", "forward"])
def test_only_the_output_is_written(merge: str) -> None:
    """Outputs are views of larger tensors, which stay unchanged around them."""
    if merge == "forward":
        spec, config = KernelSpec("forward", 64, "fp16", group=3, causal=True, stats=True), FORWARD
        shape = Shape(batch=2, heads=6, kv_heads=2, seqlen_q=71, seqlen_kv=75)
    else:
        spec = KernelSpec("decode", 64, "fp16", group=3)
        config = replace(DECODE, NUM_SPLITS=1 if merge == "none" else 3, merge=merge)
        shape = Shape(batch=2, heads=6, kv_heads=2, seqlen_q=1, seqlen_kv=75)
    inputs = inputs_of(spec, shape)
    call = verify.poisoned_call(spec, config, inputs)
    around = [torch.full((2, shape.seqlen_q + 2, 8, 192), 7.0, dtype=torch.float16) for _ in range(2)]
    out, v_mean = (x[:, 1:-1, 1:-1, 64:128] for x in around)
    call.written["out"] = out
    if spec.stats:
        call.written["v_mean"] = v_mean
    load(render(spec, config, GPU)).launch(*call.arguments(softmax_scale(spec)))
    assert verify.judge(call, verify.oracle(spec, inputs)).wrong is None
    out.fill_(7.0)
    v_mean.fill_(7.0)
    assert all((x == 7.0).all() for x in around)


@pytest.mark.parametrize(
    ("shape", "dim", "stride"),
    [
        pytest.param(Shape(1, 2, 1, 1, 70), 1, 1 << 25, id="keys"),
        pytest.param(Shape(3, 6, 2, 1, 10), 0, 1 << 30, id="sequences"),
    ],
)
@pytest.mark.parametrize("op", ["forward", "decode"])
def test_offsets_past_32_bits_in_k_and_v(op: str, shape: Shape, dim: int, stride: int) -> None:
    """Reserves 5 GB of address space and touches few pages. An offset that overflows reads elsewhere, or crashes."""
    spec, config = KernelSpec(op, 64, "fp16", group=shape.group), FORWARD if op == "forward" else DECODE
    inputs = inputs_of(spec, shape)
    inputs.k, inputs.v = strategies.far_apart(inputs.k, inputs.v, dim, stride)
    assert why_wrong_on(spec, config, inputs) is None


def test_offsets_past_32_bits_in_q_and_the_outputs() -> None:
    spec, config = KernelSpec("forward", 64, "fp16", causal=True, stats=True), FORWARD
    inputs = inputs_of(spec, Shape(1, 1, 1, 70, 70))
    expected = verify.oracle(spec, inputs)
    inputs.q, inputs.r = strategies.far_apart(inputs.q, inputs.r, 1, 1 << 25)
    call = verify.poisoned_call(spec, config, inputs)
    call.written["out"], call.written["v_mean"] = strategies.far_apart(call.out, call.written["v_mean"], 1, 1 << 25)
    load(render(spec, config, GPU)).launch(*call.arguments(softmax_scale(spec)))
    assert verify.judge(call, expected).wrong is None


@pytest.mark.parametrize("op", ["preprocess", "dkdv", "dqdr"])
def test_row_stats_further_apart_than_32_bits(op: str) -> None:
    """As for padded rows of many short sequences. Reserves 13 GB of address space and touches few pages."""
    config = {"preprocess": PreprocessConfig(BLOCK_M=16, num_warps=4), "dkdv": DKDV, "dqdr": DQDR}[op]
    spec = KernelSpec(op, 64, "fp16", causal=op != "preprocess")
    inputs = inputs_of(spec, Shape(1, 1, 1, 70, 70))
    expected = verify.oracle(spec, inputs)
    call = verify.poisoned_call(spec, config, inputs)
    row_stats = call.written["row_stats"] if op == "preprocess" else inputs.row_stats
    assert row_stats is not None
    stride = 1 << 30
    far = torch.empty(3 * stride + row_stats.shape[-1]).as_strided(row_stats.shape, (stride, *row_stats.stride()[1:]))
    far.copy_(row_stats)
    if op == "preprocess":
        call.written["row_stats"] = far
    else:
        inputs.row_stats = far
    load(render(spec, config, GPU)).launch(*call.arguments(softmax_scale(spec)))
    assert verify.judge(call, expected).wrong is None


@pytest.mark.parametrize("merge", ["last", "kernel", "ragged"])
def test_scratch_can_be_reused(merge: str) -> None:
    """The second launch reuses the first one's split-KV scratch and counters, with other queries and lengths."""
    spec = KernelSpec("decode_varlen" if merge == "ragged" else "decode", 64, "fp16", group=12)
    config = replace(DECODE, merge="last" if merge == "ragged" else merge)
    shape = Shape(batch=2, heads=24, kv_heads=2, seqlen_q=1, seqlen_kv=75)
    call = verify.poisoned_call(spec, config, inputs_of(spec, shape, seed=1))
    launch = load(render(spec, config, GPU)).launch
    launch(*call.arguments(softmax_scale(spec)))
    call.inputs = inputs_of(spec, shape, seed=2)
    call.out.fill_(float("nan"))
    launch(*call.arguments(softmax_scale(spec)))
    assert why_wrong(call.out, verify.oracle(spec, call.inputs)["out"], spec.dtype) is None
    if merge != "kernel":
        assert not call.scratch[1].any()
