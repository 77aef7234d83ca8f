"""The accuracy gained because the forward's d1 and d2 sum what its matmuls read: rendered kernels in Triton's CPU
interpreter, with sums of rounded and of unrounded numbers.

If one key outweighs all others, t and t_mean are nearly equal and o depends on their difference, which is lost when
p t is rounded to 16 bits and d2 is not. tests/gpu/test_accuracy.py has long rows, gradients and the kernel of
parallax-kernel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch

from parallax_gen.codegen.abi import Inputs
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import KernelSource, render
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.oracle import verify
from parallax_gen.oracle.accuracy import errors, tolerance, why_wrong
from parallax_gen.oracle.inputs import attend, random_inputs_of, softmax_scale
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

# For a row without keys the kernels divide by zero and take log2(0). The GPU is silent, the interpreter warns.
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

GPU = GPUS["h200"]
CONFIG = ForwardConfig(BLOCK_M=64, BLOCK_N=32, GROUP_HEADS=1, num_warps=4, num_stages=2)
FULL = KernelSpec("forward", 64, "fp16", group=2, stats=True)
CAUSAL = KernelSpec("forward", 64, "fp16", group=2, causal=True, stats=True)
WINDOW = KernelSpec("forward", 64, "fp16", group=2, causal=True, stats=True, window=True)
VARLEN = KernelSpec("forward", 64, "fp16", group=2, causal=True, stats=True, varlen=True)


def normal(x: Inputs) -> None:
    """Unchanged random inputs: s and t have unit variance."""


def large_probes(x: Inputs) -> None:
    x.r.mul_(8)


def sink(x: Inputs) -> None:
    """The first key has nearly all weight (e^10 times another key's) and t = 256; other keys have t of about 1."""
    x.q[..., 0], x.r[..., 0], x.k[..., 0] = 5, 16, 0
    if x.cu_seqlens_k is None:
        x.k[:, 0, :, 0] = 16
    else:
        x.k[[start for start in x.cu_seqlens_k.tolist() if start < len(x.k)], :, 0] = 16


def outputs(spec: KernelSpec, inputs: Inputs, *, rounded_sums: bool = True) -> dict[str, torch.Tensor]:
    source = render(spec, CONFIG, GPU)
    if not rounded_sums:
        text = with_unrounded_sums(source.text)
        source = KernelSource("plain", text, hashlib.sha256(text.encode()).hexdigest())
    call = verify.poisoned_call(spec, CONFIG, inputs)
    load(source).launch(*call.arguments(softmax_scale(spec)))
    return call.written


def with_unrounded_sums(text: str) -> str:
    """A kernel whose sums d1 and d2 are of the numbers before they are rounded for the matmuls."""
    rounded = "return rounded, rounded.to(tl.float32)"
    assert rounded in text
    return text.replace(rounded, "return rounded, x")


def inputs_of(spec: KernelSpec, prepare: Callable[[Inputs], None], seed: int) -> Inputs:
    shape = Shape(2, 4, 2, 150, 150, window=41 if spec.window else 0)
    inputs = random_inputs_of(spec, shape, seed=seed, device="cpu", full=True)
    prepare(inputs)
    return inputs


def errors_of_out(spec: KernelSpec, inputs: Inputs) -> tuple[float, float]:
    """The errors of the kernel, and of one with unrounded sums."""
    expected = attend(spec, inputs).out
    ours, plain = (errors(outputs(spec, inputs, rounded_sums=way)["out"], expected).relative for way in (True, False))
    return ours, plain


@pytest.mark.parametrize("spec", [FULL, CAUSAL, VARLEN], ids=["full", "causal", "varlen"])
def test_an_attention_sink_has_a_tenth_of_the_error(spec: KernelSpec) -> None:
    ours, plain = errors_of_out(spec, inputs_of(spec, sink, seed=1))
    assert ours < tolerance("fp16") < plain
    assert ours < plain / 10


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("prepare", [normal, large_probes], ids=lambda prepare: prepare.__name__)
@pytest.mark.parametrize("spec", [FULL, CAUSAL, WINDOW, VARLEN], ids=["full", "causal", "window", "varlen"])
def test_other_inputs_are_as_accurate(spec: KernelSpec, prepare: Callable[[Inputs], None], seed: int) -> None:
    """Nearly: p t is formed of the rounded p and rounded again, so two roundings are in it."""
    ours, plain = errors_of_out(spec, inputs_of(spec, prepare, seed))
    assert ours < 1.15 * plain


@pytest.mark.parametrize("prepare", [normal, large_probes, sink], ids=lambda prepare: prepare.__name__)
@pytest.mark.parametrize("spec", [FULL, CAUSAL, WINDOW, VARLEN], ids=["full", "causal", "window", "varlen"])
def test_the_stats_are_right(spec: KernelSpec, prepare: Callable[[Inputs], None]) -> None:
    """With fp16 inputs the error of t_mean is that of fp32 sums, as with fp32 inputs."""
    inputs = inputs_of(spec, prepare, seed=3)
    found, expected = outputs(spec, inputs), attend(spec, inputs)
    assert why_wrong(found["t_mean"], expected.t_mean, "fp32") is None
    assert why_wrong(found["lse"].exp(), expected.lse.exp(), "fp32") is None
    assert why_wrong(found["v_mean"], expected.v_mean, "fp16") is None
