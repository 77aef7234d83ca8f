"""What tests of kernels in the interpreter share: the card that they are rendered for, configs of each op, inputs."""

from __future__ import annotations

from parallax_gen.codegen.abi import Inputs
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.ops.dqdr import DqDrConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.oracle.inputs import random_inputs_of
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

GPU = GPUS["h200"]

FORWARD = ForwardConfig(BLOCK_M=64, BLOCK_N=32, GROUP_HEADS=1, num_warps=4, num_stages=2)
DKDV = DkDvConfig(BLOCK_M=32, BLOCK_N=64, GROUP_HEADS=2, num_warps=4, num_stages=2)
DQDR = DqDrConfig(BLOCK_M=64, BLOCK_N=32, GROUP_HEADS=1, num_warps=4, num_stages=2)
DECODE = DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=3, merge="last", num_warps=2, num_stages=3)


def inputs_of(spec: KernelSpec, shape: Shape, seed: int = 1) -> Inputs:
    return random_inputs_of(spec, shape, seed=seed, device="cpu")
