"""Whole training steps by rendered kernels: forward, preprocess, dkdv and dqdr, each on outputs of the earlier ones.

There are STEPS random steps (`strategies.step_case`). A run takes the seeds `first, first + stride, ...` from
PARALLAX_GEN_STEPS="first/stride". If it is not set: every fifth seed on a card, every fiftieth in the interpreter.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace

import torch
from strategies import VALUE_PRESERVING_LAYOUTS, StepCase

from parallax_gen.codegen.abi import Call, Inputs
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import render
from parallax_gen.oracle import verify
from parallax_gen.oracle.accuracy import why_wrong
from parallax_gen.oracle.inputs import attend, oracle_options, random_inputs_of, softmax_scale
from parallax_gen.oracle.reference import Gradients, reference_backward, reference_varlen_backward
from parallax_gen.problem.hardware import Gpu
from parallax_gen.runtime.described import described_tensors

STEPS = 500


def seeds(every: int) -> range:
    """The seeds of this run; every `every`-th one if PARALLAX_GEN_STEPS is not set."""
    first, stride = map(int, os.environ.get("PARALLAX_GEN_STEPS", f"0/{every}").split("/"))
    return range(first, STEPS, stride)


def inputs_of(case: StepCase, device: str) -> Inputs:
    """q, r, k, v and do in a random layout. Packed sequences have any length, including 0."""
    inputs = random_inputs_of(case.spec, case.shape, seed=case.seed, device=device)
    generator = torch.Generator(device).manual_seed(case.seed + 1)
    do = torch.randn(inputs.q.shape, device=device, generator=generator)
    layout = random.Random(case.seed).choice((lambda contiguous: contiguous, *VALUE_PRESERVING_LAYOUTS))
    return layout(replace(inputs, do=do.to(inputs.q.dtype)))


def run(case: StepCase, inputs: Inputs, gpu: Gpu) -> dict[str, torch.Tensor]:
    """Launch the case's kernels: out, lse, t_mean, v_mean, dq, dr, dk and dv.

    As in a call, tensors that allow no descriptors are loaded by pointers.
    """

    def launch(op: str, kernel_inputs: Inputs) -> Call:
        spec, config = case.spec.for_op(op), case.configs[op]
        call = verify.poisoned_call(spec, config, kernel_inputs)
        arguments = call.arguments(softmax_scale(spec))
        described = described_tensors(spec, config, gpu)
        by_pointers = described is not None and not described.allow(arguments)  # type: ignore[arg-type]
        module = described.by_pointers() if by_pointers else load(render(spec, config, gpu))  # type: ignore[union-attr]
        module.launch(*arguments)
        return call

    step = launch("forward", inputs).written
    kernel_inputs = replace(inputs, row_stats=launch("preprocess", replace(inputs, **step)).written["row_stats"])
    return {**step, **launch("dkdv", kernel_inputs).written, **launch("dqdr", kernel_inputs).written}


def gradients(case: StepCase, inputs: Inputs) -> Gradients:
    """The oracle's gradients in float64."""
    x, spec = inputs, case.spec
    options = oracle_options(spec, x)
    if spec.varlen:
        return reference_varlen_backward(x.q, x.r, x.k, x.v, x.do, x.cu_seqlens_q, x.cu_seqlens_k, **options)
    return reference_backward(x.q, x.r, x.k, x.v, x.do, **options)


def why_tensors_differ(
    x: Inputs, name: str, result: torch.Tensor, expected: torch.Tensor, dtype: str, natural: torch.Tensor | None = None
) -> str | None:
    """`why_wrong` for rows that belong to a sequence. Padding rows must be bitwise equal."""
    (own, padding), (ref, ref_padding) = (verify.of_sequences(x, name, y) for y in (result, expected))
    if not torch.equal(padding.double(), ref_padding):
        return "padding rows differ"
    return why_wrong(own, ref, dtype, natural)


def why_steps_differ(case: StepCase, inputs: Inputs, result: dict[str, torch.Tensor]) -> str | None:
    """The step's outputs that differ from float64 by more than rounding explains, else None."""
    x, dtype = inputs, case.spec.dtype
    reasons = {"out": why_tensors_differ(x, "out", result["out"], attend(case.spec, x).out, dtype)}
    sizes = verify.term_sizes(case.spec, x)._asdict()
    for name, expected in gradients(case, x)._asdict().items():
        reasons[name] = why_tensors_differ(x, name, result[name], expected, dtype, sizes[name])
    return "; ".join(f"{name}: {why}" for name, why in reasons.items() if why) or None


def wrong(case: StepCase, gpu: Gpu, device: str) -> str | None:
    """`why_steps_differ` of one run on the case's inputs."""
    inputs = inputs_of(case, device)
    return why_steps_differ(case, inputs, run(case, inputs, gpu))
