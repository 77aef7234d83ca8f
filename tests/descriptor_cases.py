"""Kernels that load blocks by tensor descriptors, and the comparison with those that load by pointers."""

from __future__ import annotations

from dataclasses import replace

import torch

from parallax_gen.codegen.abi import Inputs, prepare
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import render
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.ops.dqdr import DqDrConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.tiles import TileConfig
from parallax_gen.oracle.inputs import random_inputs_of, softmax_scale
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

GPU = GPUS["h200"]
FORWARD = ForwardConfig(64, 32, 2, num_warps=4, num_stages=2)
DKDV = DkDvConfig(32, 64, 2, num_warps=4, num_stages=2)
DQDR = DqDrConfig(64, 32, 2, num_warps=4, num_stages=2)
CAUSAL = KernelSpec("forward", 64, "bf16", causal=True)

CASES = {
    "forward": (replace(CAUSAL, stats=True), FORWARD),
    "forward, fixed reference": (replace(CAUSAL, stats=True), replace(FORWARD, SOFTMAX="fixed_reference")),
    "forward, window": (replace(CAUSAL, window=True), replace(FORWARD, SOFTMAX="fixed_reference")),
    "forward, full, GQA": (KernelSpec("forward", 64, "fp16", group=2), FORWARD),
    "forward, chunked": (replace(CAUSAL, head_dim=96), replace(FORWARD, HEAD_DIM_LAYOUT="chunked")),
    "forward, padded": (replace(CAUSAL, head_dim=72), replace(FORWARD, HEAD_DIM_LAYOUT="padded")),
    "forward, split": (replace(CAUSAL, head_dim=256), replace(FORWARD, HEAD_DIM_LAYOUT="split")),
    "dkdv": (KernelSpec("dkdv", 64, "bf16", causal=True), replace(DKDV, ROW_STATS="fused")),
    "dkdv, stacked": (KernelSpec("dkdv", 64, "bf16", causal=True), replace(DKDV, QR_TILE="stacked")),
    "dkdv, stacked, GQA": (KernelSpec("dkdv", 64, "bf16", group=2), replace(DKDV, QR_TILE="stacked")),
    "dkdv, stacked, chunked": (
        KernelSpec("dkdv", 96, "bf16", causal=True, window=True),
        replace(DKDV, QR_TILE="stacked", HEAD_DIM_LAYOUT="chunked"),
    ),
    "dkdv, stacked, split": (
        KernelSpec("dkdv", 256, "bf16", causal=True),
        replace(DKDV, QR_TILE="stacked", HEAD_DIM_LAYOUT="split"),
    ),
    "dqdr": (KernelSpec("dqdr", 64, "bf16", group=2, causal=True, softcap=True), DQDR),
    "dqdr, full": (KernelSpec("dqdr", 64, "bf16"), DQDR),
    "dqdr, stacked, chunked": (
        KernelSpec("dqdr", 96, "bf16", causal=True),
        replace(DQDR, QR_TILE="stacked", MASK="before_exp", HEAD_DIM_LAYOUT="chunked"),
    ),
}


def outputs(spec: KernelSpec, config: TileConfig, inputs: Inputs) -> dict[str, torch.Tensor]:
    call = prepare(spec, config, inputs)
    for tensor in call.written.values():
        tensor.fill_(float("nan"))
    load(render(spec, config, GPU)).launch(*call.arguments(softmax_scale(spec)))
    return call.written


def assert_same(spec: KernelSpec, config: TileConfig, inputs: Inputs) -> None:
    """The kernels of a config by pointers and by descriptors give the same bits."""
    by_pointers = outputs(spec, config, inputs)
    by_descriptors = outputs(spec, replace(config, LOADS="descriptors"), inputs)
    for name, tensor in by_pointers.items():
        assert torch.equal(by_descriptors[name].isnan(), tensor.isnan()), name
        assert torch.equal(by_descriptors[name].nan_to_num(), tensor.nan_to_num()), name


def inputs_of(spec: KernelSpec, device: str = "cpu") -> Inputs:
    """Inputs of lengths that no tile divides, with q at a lower address than r."""
    shape = Shape(2, 2 * spec.group, 2, 75, 91, 37 if spec.window else 0)
    inputs = random_inputs_of(spec, shape, seed=3, device=device)
    q, r = torch.stack([inputs.q, inputs.r])
    return replace(inputs, q=q, r=r)
