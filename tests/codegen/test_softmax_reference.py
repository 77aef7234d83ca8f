"""SOFTMAX="fixed_reference": tiles whose sums overflow are detected and recomputed by the fixup kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from parallax_gen.codegen.abi import Call, Inputs, prepare
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import KernelSource, render
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.oracle import verify
from parallax_gen.oracle.inputs import random_inputs_of, softmax_scale
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

# The GPU is silent where the interpreter warns: for a row without keys (0/0, log2(0)), and on overflow.
pytestmark = [
    pytest.mark.interpreter,
    *(
        pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
        for what in ("divide by zero", "overflow", "invalid")
    ),
]

CAUSAL: dict[str, Any] = {"causal": True, "stats": True}
SPECS = (
    KernelSpec("forward", 32, "fp32"),
    KernelSpec("forward", 32, "fp32", **CAUSAL),
    KernelSpec("forward", 48, "fp32", group=2, **CAUSAL),
    KernelSpec("forward", 32, "fp32", window=True, **CAUSAL),
    KernelSpec("forward", 40, "fp32", varlen=True),
    KernelSpec("forward", 32, "fp32", group=2, varlen=True, window=True, **CAUSAL),
    KernelSpec("forward", 40, "tf32", varlen=True),
    KernelSpec("forward", 32, "tf32", **CAUSAL),
    KernelSpec("forward", 32, "tf32"),
    KernelSpec("forward", 48, "tf32", group=2, varlen=True, window=True, **CAUSAL),
)
HEADS = 10  # the heads of two sequences exceed one program of the fixup kernel


def config_of(spec: KernelSpec) -> ForwardConfig:
    form = {48: "chunked", 40: "padded"}.get(spec.head_dim, "native")
    rows = 32 if spec.dtype == "fp32" else 64
    return ForwardConfig(
        rows, 32, GROUP_HEADS=4, num_warps=4, num_stages=2, HEAD_DIM_LAYOUT=form, SOFTMAX="fixed_reference"
    )


def inputs_of(spec: KernelSpec) -> Inputs:
    """Two tiles a head."""
    lengths = (50, 60) if spec.dtype == "fp32" else (70, 90)
    shape = Shape(2, HEADS, HEADS // spec.group, *lengths, window=41 if spec.window else 0)
    return random_inputs_of(spec, shape, seed=7, device="cpu")


def launched(source: KernelSource, spec: KernelSpec, inputs: Inputs) -> Call:
    call = prepare(spec, config_of(spec), inputs)
    load(source).launch(*call.arguments(softmax_scale(spec)))
    return call


def without_fixup_kernel(source: KernelSource) -> KernelSource:
    begin = source.text.index("    fixup_kernel[(")
    return KernelSource("forward_once", source.text[:begin], "once" + source.sha256[4:])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_overflowing_tiles_are_recomputed(spec: KernelSpec) -> None:
    """In two heads some rows have keys that outweigh the reference key by e^45 and more."""
    source, inputs = render(spec, config_of(spec), GPUS["h200"]), inputs_of(spec)
    rows = slice(40, 50) if spec.varlen else (slice(None), slice(40, 50))
    for head in (3, HEADS - 1):
        where = (rows, head) if spec.varlen else (*rows, head)
        inputs.q[where] *= 20

    once = launched(without_fixup_kernel(source), spec, inputs)
    out, _ = verify.of_sequences(inputs, "out", once.out)  # the fixup kernel fills the padding rows
    unfinished = out.isnan().any(-1)  # by row and head
    assert unfinished.any()
    assert not unfinished[..., [h for h in range(HEADS) if h not in (3, HEADS - 1)]].any()

    verdict = verify.launch_and_check(source, spec, config_of(spec), inputs, verify.oracle(spec, inputs))
    assert verdict.wrong is None


@pytest.mark.parametrize("spec", SPECS[::2], ids=str)
def test_usual_scores_need_no_fixup(spec: KernelSpec) -> None:
    source, inputs = render(spec, config_of(spec), GPUS["h200"]), inputs_of(spec)
    once, both = launched(without_fixup_kernel(source), spec, inputs), launched(source, spec, inputs)
    for name, written in both.written.items():  # the fixup kernel fills the padding rows
        alone, together = (verify.of_sequences(inputs, name, x)[0] for x in (once.written[name], written))
        assert torch.equal(alone, together), name


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_far_from_zero(sign: float) -> None:
    """As with a running maximum; here the scores of the first key and of the others differ by twice as much."""
    spec = SPECS[0]
    inputs = inputs_of(spec)
    inputs.q[..., 0] = 1024.0
    inputs.k[..., 0] = 4.0 * sign
    inputs.k[:, 0, :, 0] *= -1.0
    out = launched(render(spec, config_of(spec), GPUS["h200"]), spec, inputs).out
    expected = verify.oracle(spec, inputs)["out"]
    assert float((out.double() - expected).norm() / expected.norm()) < 1e-3  # a score near 1000 is rounded to 2^-14


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[7]], ids=str)
def test_nan_stays_in_its_row(spec: KernelSpec) -> None:
    inputs = inputs_of(spec)
    inputs.q[0, 33, 2] = float("nan")
    out = launched(render(spec, config_of(spec), GPUS["h200"]), spec, inputs).out
    assert out[0, 33, 2].isnan().all()
    out[0, 33, 2] = 0.0
    assert out.isfinite().all()


def permuted(x: torch.Tensor, seed: int) -> torch.Tensor:
    return x[..., torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(seed))].contiguous()


DOT_ROWS: Any = None  # a rendered kernel's


@triton.jit
def row_dots(x_ptr, y_ptr, out_ptr, PLAIN: tl.constexpr):
    offs_m, offs_d = tl.arange(0, 64), tl.arange(0, 128)
    x = tl.load(x_ptr + offs_m[:, None] * 128 + offs_d[None, :])
    y = tl.load(y_ptr + offs_d)[None, :]
    dots = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1) if PLAIN else DOT_ROWS(x, y)
    tl.store(out_ptr + offs_m, dots)


def test_the_reference_does_not_depend_on_the_order_of_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 keeps a row's elements in other threads where statistics are written: its sum has another order."""
    spec = KernelSpec("forward", 128, "bf16", **CAUSAL)
    config = ForwardConfig(64, 64, GROUP_HEADS=4, num_warps=4, num_stages=2, SOFTMAX="fixed_reference")
    monkeypatch.setitem(globals(), "DOT_ROWS", load(render(spec, config, GPUS["h200"]))._dot_rows)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 128, generator=draw).bfloat16(), (4 * torch.randn(128, generator=draw)).bfloat16()

    def dots(seed: int, plain: bool) -> torch.Tensor:
        out = torch.empty(64)
        row_dots[(1,)](permuted(x, seed), permuted(y, seed), out, PLAIN=plain)
        return out

    first, *others = (dots(seed, plain=False) for seed in range(8))
    assert all(torch.equal(first, other) for other in others)
    plain, *others = (dots(seed, plain=True) for seed in range(8))
    assert not any(torch.equal(plain, other) for other in others)
    assert (first - plain).abs().max() < 128 * 2**-12  # each of the 128 products is rounded to the nearest 2^-11
