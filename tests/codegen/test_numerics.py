"""Rendered forwards in fp16 on hard inputs, in Triton's CPU interpreter: an attention sink, and large probes.

If the first key outweighs all others, t and t_mean are nearly equal and o depends on their difference: if p t, and not
p (t - t_mean), were rounded, o would be off by up to 256 * 2^-11, 12 % of it, for t of 256. test_peaked_rows.py has
bf16, other kinds of rows and decode; tests/gpu/test_accuracy.py long rows, gradients and parallax-kernel's kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from parallax_gen.codegen.abi import Inputs
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import render
from parallax_gen.ops.decode_form import DecodeConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.oracle import verify
from parallax_gen.oracle.accuracy import errors, why_wrong
from parallax_gen.oracle.inputs import attend, random_inputs_of, softmax_scale
from parallax_gen.oracle.reference import reference_forward
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

# For a row without keys the kernels divide by zero and take log2(0). The GPU is silent, the interpreter warns.
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

GPU = GPUS["h200"]
CONFIG = ForwardConfig(BLOCK_M=64, BLOCK_N=32, GROUP_HEADS=1, num_warps=4, num_stages=2)
MERGE = {"decode": "none", "decode_varlen": "last"}  # with a single split
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


def outputs(spec: KernelSpec, inputs: Inputs) -> dict[str, torch.Tensor]:
    call = verify.poisoned_call(spec, CONFIG, inputs)
    load(render(spec, CONFIG, GPU)).launch(*call.arguments(softmax_scale(spec)))
    return call.written


def inputs_of(spec: KernelSpec, prepare: Callable[[Inputs], None], seed: int) -> Inputs:
    shape = Shape(2, 4, 2, 150, 150, window=41 if spec.window else 0)
    inputs = random_inputs_of(spec, shape, seed=seed, device="cpu", full=True)
    prepare(inputs)
    return inputs


# p, p (t - t_mean) and o are rounded, by up to 2^-11 = 4.9e-4 and some 2e-4 in the mean; sqrt(3) times that if all
# three count. Under a sink the other keys count, whose t - t_mean is about -256.
MOST = {"normal": 3.5e-4, "large_probes": 4e-4, "sink": 4.9e-4}


@pytest.mark.parametrize("prepare", [normal, large_probes, sink], ids=lambda prepare: prepare.__name__)
@pytest.mark.parametrize("spec", [FULL, CAUSAL, WINDOW, VARLEN], ids=["full", "causal", "window", "varlen"])
def test_the_output_is_right(spec: KernelSpec, prepare: Callable[[Inputs], None]) -> None:
    inputs = inputs_of(spec, prepare, seed=1)
    error = errors(outputs(spec, inputs)["out"], attend(spec, inputs).out).relative
    assert error < MOST[prepare.__name__]


@pytest.mark.parametrize("prepare", [normal, large_probes, sink], ids=lambda prepare: prepare.__name__)
@pytest.mark.parametrize("spec", [FULL, CAUSAL, WINDOW, VARLEN], ids=["full", "causal", "window", "varlen"])
def test_the_stats_are_right(spec: KernelSpec, prepare: Callable[[Inputs], None]) -> None:
    """With fp16 inputs the error of t_mean is that of fp32 sums, as with fp32 inputs."""
    inputs = inputs_of(spec, prepare, seed=3)
    found, expected = outputs(spec, inputs), attend(spec, inputs)
    assert why_wrong(found["t_mean"], expected.t_mean, "fp32") is None
    assert why_wrong(found["lse"].exp(), expected.lse.exp(), "fp32") is None
    assert why_wrong(found["v_mean"], expected.v_mean, "fp16") is None


@pytest.mark.parametrize("op", ["forward", "decode", "decode_varlen"])
def test_a_first_block_whose_scores_are_all_minus_infinity_adds_nothing(op: str) -> None:
    """Its scores overflow, so that d1 and d2 are still 0 after it. The center d2 / d1 must not be 0 / 0."""
    spec = FULL if op == "forward" else KernelSpec(op, 64, "fp16", group=2)
    config = (
        CONFIG if op == "forward" else DecodeConfig(32, 8, NUM_SPLITS=1, merge=MERGE[op], num_warps=2, num_stages=2)
    )
    inputs = random_inputs_of(spec, Shape(2, 4, 2, 1, 100), seed=1, device="cpu", full=True)
    inputs.q.fill_(1)
    inputs.k.zero_()
    inputs.k[:, :40] = -1  # more than the first block
    call, scale = verify.poisoned_call(spec, config, inputs), 1e38
    load(render(spec, config, GPU)).launch(*call.arguments(scale))
    expected = reference_forward(inputs.q, inputs.r, inputs.k, inputs.v, softmax_scale=scale).out
    assert errors(call.written["out"], expected).relative < MOST["normal"]
