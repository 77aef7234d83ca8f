"""What compiling would show, guessed: so that what the model likes is compiled first.

From compiling some 900 tiles, and decode's whole space twice, for Hopper in bf16 with Triton 3.6: registers are guessed
to 20 of 255 or so, spills to a factor of two. That ranks all but as well as what was compiled does.
"""

from __future__ import annotations

from collections.abc import Iterable

from parallax_gen.codegen.pieces import scored_and_summed
from parallax_gen.codegen.resources import Resources
from parallax_gen.problem.config import DecodeConfig, KernelConfig, TileConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.space import MOST_REGISTERS, block_bytes, shared_bytes
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.model import predict_us

# Bytes spilled for each register a thread lacks. The forward can do one score after the other; a backward holds more
# tiles of scores at a time, and dkdv's rows of numbers beside them.
SPILLED = {"forward": 0.4, "dqdr": 1.5, "dkdv": 3.0}
POSTPONED = 100  # registers of decode's keys and values that are loaded later where they do not fit


def guess_us(spec: KernelSpec, config: KernelConfig, shape: Shape, gpu: Gpu) -> float:
    """Microseconds that a call should take, of a config that was not compiled."""
    return predict_us(spec, config, shape, gpu, guess_resources(spec, config, gpu))


def ranked(spec: KernelSpec, shape: Shape, gpu: Gpu, configs: Iterable[KernelConfig]) -> list[KernelConfig]:
    """The configs, those first that should be fastest."""
    return sorted(configs, key=lambda config: guess_us(spec, config, shape, gpu))


def guess_resources(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> Resources:
    """Registers, spills and shared memory that a valid config should take."""
    shared = shared_bytes(spec, config, gpu)
    if isinstance(config, TileConfig):
        return _of_tiles(spec, config, gpu, shared)
    if isinstance(config, DecodeConfig):
        # Two sums and two scores of each head, and keys or values on their way from shared memory, two to a register,
        # with where they come from.
        sums = 2 * config.BLOCK_H * (spec.head_dim + config.BLOCK_N)
        needed = 40 + (sums + config.BLOCK_N * spec.head_dim) // (32 * config.num_warps)
        spills = 4 * max(0, needed - MOST_REGISTERS - POSTPONED)
        return Resources(min(MOST_REGISTERS, needed), spills, shared)
    return Resources(64, 0, shared)  # of preprocess: nothing that bounds it


def _of_tiles(spec: KernelSpec, config: TileConfig, gpu: Gpu, shared: int) -> Resources:
    owned, step = (config.BLOCK_N, config.BLOCK_M) if spec.op == "dkdv" else (config.BLOCK_M, config.BLOCK_N)
    scored, summed = (
        sum(p.width for p in pieces) for pieces in scored_and_summed(spec.op, spec.head_dim, config.HEAD_DIM_AS)
    )
    # Two sums of what is owned, some three tiles of scores, a block on its way to the matmuls, and addresses; where
    # tiles are too small for matmuls that read shared memory, the operands too.
    a_thread = (1.2 * 2 * owned * summed + 3.3 * owned * step + step * scored) / (32 * config.num_warps)
    needed = 25 + a_thread + (45 if owned < 64 else 0)
    most = config.maxnreg or MOST_REGISTERS
    lacking = max(0.0, needed - most) * (2 if config.maxnreg else 1)  # held down, the innermost spill too
    if owned >= 64 and config.num_stages > 1 and gpu.capability[0] >= 9:
        shared += block_bytes(spec, config)  # those matmuls run on while the next block is loaded
    return Resources(int(min(needed, most)), int(SPILLED[spec.op] * lacking), shared)
