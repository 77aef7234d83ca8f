"""Rendered kernels on a card against the fp64 oracle, as in the CPU interpreter, also in bf16 and at larger sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import strategies
import torch
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from strategies import Case, Kernel
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from triton.runtime.errors import OutOfResources

from parallax_gen.codegen.abi import Call, Inputs
from parallax_gen.codegen.build import load
from parallax_gen.codegen.device import gpu_of_device
from parallax_gen.codegen.render import render
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.ops.dqdr import DqDrConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.preprocess import PreprocessConfig
from parallax_gen.ops.space import default_config, why_invalid
from parallax_gen.oracle import verify
from parallax_gen.oracle.accuracy import why_wrong
from parallax_gen.oracle.inputs import POISON, random_inputs_of, softmax_scale
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import DTYPES, OPS, KernelSpec

pytestmark = pytest.mark.gpu

FORWARD = ForwardConfig(BLOCK_M=64, BLOCK_N=64, GROUP_HEADS=1, num_warps=4, num_stages=2)
DECODE = DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=6, merge="last", num_warps=2, num_stages=3)
PREPROCESS = PreprocessConfig(BLOCK_M=32, num_warps=4)
DKDV = DkDvConfig(BLOCK_M=64, BLOCK_N=64, GROUP_HEADS=1, num_warps=4, num_stages=2)
DQDR = DqDrConfig(BLOCK_M=64, BLOCK_N=64, GROUP_HEADS=1, num_warps=4, num_stages=2)
UNSPLIT = replace(DECODE, NUM_SPLITS=1, merge="none")
MERGES = [UNSPLIT, DECODE, replace(DECODE, merge="kernel")]
# decode_varlen, merged by the last program to arrive.
SPLITS = [replace(DECODE, NUM_SPLITS=splits) for splits in (1, 6, 48)]


def inputs_of(spec: KernelSpec, shape: Shape, seed: int = 1) -> Inputs:
    return random_inputs_of(spec, shape, seed=seed, device="cuda")


def why_kernel_wrong(spec: KernelSpec, config: KernelConfig, shape: Shape, seed: int = 1) -> str | None:
    return why_wrong_on(spec, config, inputs_of(spec, shape, seed))


def why_wrong_on(spec: KernelSpec, config: KernelConfig, inputs: Inputs) -> str | None:
    return verify.launch_and_check(
        render(spec, config, gpu_of_device(0)), spec, config, inputs, verify.oracle(spec, inputs)
    ).wrong


def launcher(spec: KernelSpec, config: KernelConfig, call: Call) -> Callable[[], None]:
    launch, arguments = load(render(spec, config, gpu_of_device(0))).launch, call.arguments(softmax_scale(spec))
    return lambda: launch(*arguments)


def compiles_quickly(case: Case) -> bool:
    """Larger fp32 tiles (no tensor cores) spill kilobytes per thread and compile for half a minute."""
    config = case.config
    if case.spec.dtype != "fp32" or isinstance(config, PreprocessConfig):  # preprocess has no matmuls
        return True
    rows = 2 * config.BLOCK_H if isinstance(config, DecodeConfig) else config.BLOCK_M
    return rows * config.BLOCK_N * case.spec.head_dim <= 1 << 17


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=30)
@given(data=st.data())
def test_any_kernel_agrees_with_the_oracle(op: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(op, DTYPES, gpu_of_device(0), most_programs=1 << 20))
    assume(compiles_quickly(case))
    try:
        assert why_kernel_wrong(case.spec, case.config, case.shape, case.seed) is None
    except OutOfResources:  # only compiling shows it
        reject()


def test_queries_of_one_key_in_tf32() -> None:
    """Their gradients are 0, so the kernels write the rounding error of terms that cancel."""
    spec = KernelSpec("dqdr", 8, "tf32", causal=True, window=True, varlen=True)
    config = DqDrConfig(
        BLOCK_M=16, BLOCK_N=64, GROUP_HEADS=1, num_warps=4, num_stages=1, HEAD_DIM_LAYOUT="padded", MASK="after_exp"
    )
    for seed in range(8):
        assert why_kernel_wrong(spec, config, Shape(2, 1, 1, 3, 28, 1), seed) is None


@pytest.mark.parametrize("kernel", strategies.GOLDEN.values(), ids=strategies.GOLDEN)
def test_golden_kernels(kernel: Kernel) -> None:
    spec, config = kernel.spec, kernel.config
    if reason := why_invalid(spec, config, gpu_of_device(0)):
        pytest.skip(reason)
    assert why_kernel_wrong(spec, config, op_of(spec).awkward_shape(spec, config)) is None


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [(4096, 4096), (4095, 4097), (4097, 2050)])
def test_long_causal_sequences_by_default(lengths: tuple[int, int], head_dim: int, stats: bool) -> None:
    spec, shape = KernelSpec("forward", head_dim, "bf16", group=2, causal=True, stats=stats), Shape(1, 4, 2, *lengths)
    assert why_kernel_wrong(spec, default_config(spec, shape, gpu_of_device(0)), shape) is None


@pytest.mark.parametrize("group", [1, 12])
@pytest.mark.parametrize("config", [None, *MERGES], ids=["default", "none", "last", "kernel"])
def test_long_caches(config: DecodeConfig | None, group: int) -> None:
    spec, shape = KernelSpec("decode", 128, "bf16", group=group), Shape(3, 2 * group, 2, 1, 16384)
    assert why_kernel_wrong(spec, config or default_config(spec, shape, gpu_of_device(0)), shape) is None


@pytest.mark.parametrize("group", [1, 12])
@pytest.mark.parametrize("config", [None, *SPLITS], ids=["default", "1 split", "6 splits", "48 splits"])
def test_long_caches_with_per_sequence_lengths(config: DecodeConfig | None, group: int) -> None:
    spec, shape = KernelSpec("decode_varlen", 128, "bf16", group=group), Shape(3, 2 * group, 2, 1, 16384)
    assert why_kernel_wrong(spec, config or default_config(spec, shape, gpu_of_device(0)), shape) is None


@pytest.mark.parametrize("page_size", [1, 16, 48, 64, 256])
@pytest.mark.parametrize("config", [None, *SPLITS], ids=["default", "1 split", "6 splits", "48 splits"])
def test_long_paged_caches(config: DecodeConfig | None, page_size: int) -> None:
    spec = KernelSpec("decode_varlen", 128, "bf16", group=4, page_size=page_size)
    shape = Shape(3, 8, 2, 1, 16384)
    assert why_kernel_wrong(spec, config or default_config(spec, shape, gpu_of_device(0)), shape) is None


@pytest.mark.parametrize(("op", "config"), [("forward", FORWARD), ("decode", replace(DECODE, NUM_SPLITS=8))])
def test_a_grid_past_65535(op: str, config: KernelConfig) -> None:
    """71680 programs: only axis 0 allows so many, and grids use axis 0."""
    spec = KernelSpec(op, 64, "bf16", group=1024)
    assert why_kernel_wrong(spec, config, Shape(batch=70, heads=1024, kv_heads=1, seqlen_q=1, seqlen_kv=200)) is None


@pytest.mark.parametrize("layout", strategies.LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(
    ("spec", "config", "shape"),
    [
        (KernelSpec("forward", 64, "bf16", group=2, causal=True, stats=True), FORWARD, Shape(2, 4, 2, 150, 150)),
        (KernelSpec("forward", 64, "bf16", group=2), FORWARD, Shape(2, 4, 2, 70, 150)),
        (KernelSpec("decode", 64, "bf16", group=2), DECODE, Shape(2, 4, 2, 1, 300)),
        (KernelSpec("decode_varlen", 64, "bf16", group=2), DECODE, Shape(2, 4, 2, 1, 300)),
    ],
    ids=["causal", "full", "decode", "decode_varlen"],
)
def test_strided_inputs(
    spec: KernelSpec, config: KernelConfig, shape: Shape, layout: Callable[[Inputs], Inputs]
) -> None:
    assert why_wrong_on(spec, config, layout(inputs_of(spec, shape, seed=2))) is None


@pytest.mark.parametrize(
    ("shape", "dim", "stride"),
    [
        pytest.param(Shape(1, 2, 1, 1, 600), 1, 1 << 22, id="keys"),
        pytest.param(Shape(3, 6, 2, 1, 50), 0, 1 << 30, id="sequences"),
    ],
)
@pytest.mark.parametrize(("op", "config"), [("forward", FORWARD), ("decode", DECODE)])
def test_offsets_past_32_bits_in_k_and_v(op: str, config: KernelConfig, shape: Shape, dim: int, stride: int) -> None:
    """Views of 5 GB."""
    spec = KernelSpec(op, 64, "bf16", group=shape.group)
    inputs = inputs_of(spec, shape)
    inputs.k, inputs.v = strategies.far_apart(inputs.k, inputs.v, dim, stride)
    assert why_wrong_on(spec, config, inputs) is None


def test_offsets_past_32_bits_in_q_and_the_outputs() -> None:
    """Two views of 5 GB."""
    spec = KernelSpec("forward", 64, "bf16", causal=True, stats=True)
    inputs = inputs_of(spec, Shape(1, 1, 1, 600, 600))
    expected = verify.oracle(spec, inputs)
    inputs.q, inputs.r = strategies.far_apart(inputs.q, inputs.r, 1, 1 << 22)
    call = verify.poisoned_call(spec, FORWARD, inputs)
    call.written["out"], call.written["v_mean"] = strategies.far_apart(call.out, call.written["v_mean"], 1, 1 << 22)
    launcher(spec, FORWARD, call)()
    assert verify.judge(call, expected).wrong is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("spec", "config", "shape"),
    [
        (KernelSpec("forward", 128, "bf16", group=2, causal=True, stats=True), FORWARD, Shape(2, 4, 2, 1000, 1000)),
        (KernelSpec("forward", 128, "bf16", group=2, stats=True), FORWARD, Shape(2, 4, 2, 300, 1000)),
        (KernelSpec("decode", 128, "bf16", group=2), DECODE, Shape(2, 4, 2, 1, 1000)),
    ],
    ids=["causal", "full", "decode"],
)
def test_without_probes_it_is_softmax_attention(
    spec: KernelSpec, config: KernelConfig, shape: Shape, dtype: str
) -> None:
    spec = replace(spec, dtype=dtype)
    inputs = inputs_of(spec, shape)
    inputs.r.zero_()
    call = verify.poisoned_call(spec, config, inputs)
    launcher(spec, config, call)()
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    softmax = scaled_dot_product_attention(q, k, v, is_causal=spec.causal, enable_gqa=True).transpose(1, 2)
    assert why_wrong(call.out, softmax.double(), dtype) is None
    if spec.stats:
        assert torch.equal(call.out, call.written["v_mean"])  # bitwise equal to v_mean


KERNELS = [
    pytest.param(
        KernelSpec("forward", 64, "bf16", group=2, causal=True), FORWARD, Shape(2, 8, 4, 500, 500), id="forward"
    ),
    pytest.param(KernelSpec("preprocess", 64, "bf16"), PREPROCESS, Shape(2, 8, 8, 500, 500), id="preprocess"),
    pytest.param(KernelSpec("dkdv", 64, "bf16", group=2, causal=True), DKDV, Shape(2, 8, 4, 500, 500), id="dkdv"),
    pytest.param(KernelSpec("dqdr", 64, "bf16", group=2, causal=True), DQDR, Shape(2, 8, 4, 500, 500), id="dqdr"),
    *(
        pytest.param(KernelSpec("decode", 64, "bf16", group=12), c, Shape(8, 96, 8, 1, 1000), id=c.merge)
        for c in MERGES
    ),
    pytest.param(KernelSpec("decode_varlen", 64, "bf16", group=12), DECODE, Shape(8, 96, 8, 1, 1000), id="ragged"),
]


def poison(call: Call) -> None:
    for tensor in call.written.values():
        tensor.fill_(POISON)


def copy_into(held: Inputs, fresh: Inputs) -> None:
    """Copy every tensor of `fresh` into the memory of `held`. Sizes and int lengths are equal."""
    for name, value in vars(fresh).items():
        before = getattr(held, name)
        if isinstance(value, Tensor):
            before.copy_(value)
        else:
            assert before == value, name


def wrong_after(call: Call, expected: verify.Expected) -> str | None:
    """Synchronise; then the error in the call's outputs or in the counters that it leaves, else None."""
    torch.cuda.synchronize()
    return verify.judge(call, expected).wrong


@pytest.mark.parametrize(("spec", "config", "shape"), KERNELS)
def test_two_concurrent_streams(spec: KernelSpec, config: KernelConfig, shape: Shape) -> None:
    """Each stream has its own inputs, outputs and scratch, and many launches."""
    calls = [verify.poisoned_call(spec, config, inputs_of(spec, shape, seed)) for seed in (1, 2)]
    expected = [verify.oracle(spec, call.inputs) for call in calls]
    launches = [launcher(spec, config, call) for call in calls]
    launches[0]()  # compiles
    poison(calls[0])
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(100):
        for stream, launch in zip(streams, launches, strict=True):
            with torch.cuda.stream(stream):
                launch()
    for call, reference in zip(calls, expected, strict=True):
        assert wrong_after(call, reference) is None


@pytest.mark.parametrize(("spec", "config", "shape"), KERNELS)
def test_a_captured_launch_replays(spec: KernelSpec, config: KernelConfig, shape: Shape) -> None:
    """Replay twice, with new values in the same tensors and the counters of the previous launch."""
    call = verify.poisoned_call(spec, config, inputs_of(spec, shape, seed=1))
    launch = launcher(spec, config, call)
    launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for seed in (2, 3):
        fresh = inputs_of(spec, shape, seed)
        copy_into(call.inputs, fresh)
        poison(call)
        graph.replay()
        assert wrong_after(call, verify.oracle(spec, fresh)) is None
