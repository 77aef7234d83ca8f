"""A static model of a kernel's time, from what compiling shows: it ranks configs where nothing can be measured.

A roofline, and what usually keeps a kernel from it. The factors were set by hand to sweeps on an H200, and each says
what it stands for; they order configs, and are no promise of a time.
"""

from __future__ import annotations

import math

from parallax_gen.codegen.pieces import scored_and_summed
from parallax_gen.codegen.resources import Resources
from parallax_gen.problem.config import TILED, DecodeConfig, KernelConfig, PreprocessConfig, TileConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import MATMULS, SCORES, Shape, work_of
from parallax_gen.problem.spec import KernelSpec

LAUNCH_US = 2.0  # launch, first loads, last stores
LATENCY_US = 0.8  # a load from device memory under load; a step of a loop that waits for one
SPILL_BYTES = 1000  # of stack a thread that double the time

# Of the tensor cores' peak, what the best configs reach. A backward's element takes more operations beside the
# matmuls; dkdv's statistics of rows lie along its tiles' columns, and cost it registers.
REACHED = {"forward": 0.6, "dqdr": 0.65, "dkdv": 0.5}


def bound_by_matmuls(op: str) -> bool:
    """Whether the tensor cores bound an op's time. Memory does that of decode and preprocess."""
    return op in TILED


def predict_us(spec: KernelSpec, config: KernelConfig, shape: Shape, gpu: Gpu, resources: Resources) -> float:
    """Microseconds that a call should take."""
    blocks = resident_blocks(config, gpu, resources)
    if isinstance(config, TileConfig):
        time = _tiles_us(spec, config, shape, gpu, blocks)
    elif isinstance(config, PreprocessConfig):
        time = _preprocess_us(spec, config, shape, gpu, blocks)
    else:
        time = _decode_us(spec, config, shape, gpu, blocks)
    return LAUNCH_US + time * (1 + resources.spills / SPILL_BYTES)


def resident_blocks(config: KernelConfig, gpu: Gpu, resources: Resources) -> int:
    """How many programs a multiprocessor holds at a time: the scarcest of registers, shared memory and warps."""
    registers = resources.registers * 32 * config.num_warps
    return max(
        1,
        min(
            gpu.registers_per_sm // registers,
            gpu.shared_per_sm // (resources.shared_bytes + 1024),  # 1 KB of each block is the system's
            gpu.max_warps_per_sm // config.num_warps,
            gpu.max_blocks_per_sm,
        ),
    )


def _tiles_us(spec: KernelSpec, config: TileConfig, shape: Shape, gpu: Gpu, blocks: int) -> float:
    """Bound by the matmuls, at a rate that shrinks with whatever keeps the tensor cores waiting."""
    work, dkdv = work_of(spec, shape), spec.op == "dkdv"
    # What a program owns, and what it steps over: query rows and keys, for dkdv keys and query rows.
    owned, step = (config.BLOCK_N, config.BLOCK_M) if dkdv else (config.BLOCK_M, config.BLOCK_N)
    rows, owned_length = (shape.kv_heads, shape.seqlen_kv) if dkdv else (shape.heads, shape.seqlen_q)
    rate = REACHED[spec.op] * gpu.peak(spec.dtype)
    warps = blocks * config.num_warps
    rate *= min(1.0, 0.3 + 0.7 * warps / 8)  # someone must multiply while others do their softmax
    rate *= {16: 0.5, 32: 0.7, 64: 0.9}.get(owned, 1.0)  # every owned tile reads all that it steps over
    rate *= {16: 0.75, 32: 0.87}.get(step, 1.0)  # narrow matmuls
    rate *= {1: 0.7, 2: 0.88}.get(config.num_stages, 1.0)  # loads are late
    heads = config.HEAD_GROUP or shape.batch * rows
    # What tiles share, q, r and do of a group's heads or k and v, falls out of L2 before all of them have read it.
    shared = 3 * shape.seqlen_q * heads * spec.group if dkdv else 2 * shape.seqlen_kv * max(1, heads // spec.group)
    rate *= 0.97 if shared * spec.head_dim * spec.bytes_per_element > gpu.l2_bytes else 1.0
    rate *= 0.98 if heads < 4 else 1.0  # few heads at a time spread the triangle unevenly
    widths = [piece.width for piece in scored_and_summed(spec.op, spec.head_dim, config.HEAD_DIM_AS)[0]]
    rate *= spec.head_dim / sum(widths)  # what is padded is multiplied too
    halves = config.HEAD_DIM_AS == "halves"
    rate *= 1.0 if len(widths) == 1 or halves else 0.95  # narrow matmuls
    if halves:  # both programs of a tile find its scores
        rate *= MATMULS[spec.op] / (MATMULS[spec.op] + SCORES[spec.op])
    if shape.window:  # blocks that the window's edges cross are multiplied whole
        rate *= shape.window / (shape.window + owned + step)
    # The last wave is as long as the others, however few programs it has; causal ones end with short rows.
    programs = (2 if halves else 1) * shape.batch * rows * math.ceil(owned_length / owned)
    waves = programs / (gpu.sms * blocks)
    idle = 1.0 if spec.causal and waves > 2 else math.ceil(waves) / waves
    return max(work.flops / rate * idle, work.bytes / gpu.bandwidth) * 1e6


def _preprocess_us(spec: KernelSpec, config: PreprocessConfig, shape: Shape, gpu: Gpu, blocks: int) -> float:
    """Bound by memory, at a rate that needs enough loads in flight: each program loads its rows once."""
    work = work_of(spec, shape)
    programs = shape.batch * shape.heads * math.ceil(shape.seqlen_q / config.BLOCK_M)
    busiest = math.ceil(programs / gpu.sms)  # programs on the multiprocessor that has the most
    of_program = work.bytes / (shape.batch * shape.heads * shape.seqlen_q) * config.BLOCK_M
    rate = min(0.9 * gpu.bandwidth / gpu.sms, min(blocks, busiest) * of_program / (LATENCY_US * 1e-6))
    return busiest * of_program / rate * 1e6


def _decode_us(spec: KernelSpec, config: DecodeConfig, shape: Shape, gpu: Gpu, blocks: int) -> float:
    """Bound by memory, at a rate that needs enough loads in flight on every multiprocessor; then the merge."""
    head_blocks = math.ceil(spec.group / config.BLOCK_H)
    programs = shape.batch * shape.kv_heads * head_blocks * config.NUM_SPLITS
    kv_row = 2 * spec.head_dim * spec.bytes_per_element
    busiest = math.ceil(programs / gpu.sms)  # programs on the multiprocessor that has the most
    resident = min(blocks, busiest)
    in_flight = resident * (config.num_stages - 1) * config.BLOCK_N * kv_row
    share = 0.94 * gpu.bandwidth / gpu.sms
    rate = min(share, in_flight / (LATENCY_US * 1e-6))
    steps = math.ceil(shape.seqlen_kv / config.NUM_SPLITS / config.BLOCK_N)
    stream = busiest * steps * config.BLOCK_N * kv_row / rate * 1e6
    if config.merge == "none":
        return stream + LATENCY_US
    vectors = config.NUM_SPLITS * 2 * spec.head_dim * 4  # bytes of partials a query head
    if config.merge == "kernel":
        return stream + LATENCY_US + LAUNCH_US
    heads = min(spec.group, config.BLOCK_H)  # merged one after the other by the last split
    return stream + 2 * LATENCY_US + heads * (0.2 + vectors / 80e3)  # one program loads some 80 KB a microsecond
