"""A static model of a kernel's time from its compiled resources: it ranks configs that cannot be measured.

It is a roofline times factors for what usually keeps a kernel below it. The factors were fitted by hand to partial
sweeps on an H200 (tiled ops at head_dim 64 and 256, decode at 128); the factor for rows that warps share was fitted
later to whole sweeps of tiled ops on an H100. They are meant to rank configs, not to predict times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from parallax_gen.codegen.resources import Resources
from parallax_gen.ops.base import KernelConfig, Op, OpKind, op_of
from parallax_gen.ops.decode_form import DecodeConfig
from parallax_gen.ops.preprocess import PreprocessConfig
from parallax_gen.ops.tile_form import programs_of
from parallax_gen.ops.tiles import TileConfig, TiledOp
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import MATMULS, SCORES, work_of

LAUNCH_US = 2.0  # launch, first loads, last stores
LATENCY_US = 0.8  # a load from device memory under load
PROGRAM_US = 1.5  # a program's prologue and epilogue, while other programs wait for its multiprocessor


def predict_us(spec: KernelSpec, config: KernelConfig, shape: Shape, gpu: Gpu, resources: Resources) -> float:
    """The predicted microseconds of a call."""
    op, max_resident = op_of(spec), resident_programs(config, gpu, resources)
    time = _TIMES[op.kind](op, spec, config, shape, gpu, max_resident)
    return LAUNCH_US + time * (1 + resources.spills / op.costs.spill_bytes)


def resident_programs(config: KernelConfig, gpu: Gpu, resources: Resources) -> int:
    """Programs resident on a multiprocessor: limited by registers, shared memory, warps or blocks."""
    registers = resources.registers * gpu.warp_size * config.num_warps
    reserved_bytes = 0 if gpu.is_amd else 1024  # CUDA reserves 1 KB for each block
    return max(
        1,
        min(
            gpu.registers_per_sm // registers,
            gpu.shared_per_sm // (resources.shared_bytes + reserved_bytes),
            gpu.max_warps_per_sm // config.num_warps,
            gpu.max_blocks_per_sm,
        ),
    )


def _tiles_us(
    op: TiledOp[TileConfig], spec: KernelSpec, config: TileConfig, shape: Shape, gpu: Gpu, max_resident: int
) -> float:
    """Tiled ops: bound by matmuls, at a rate reduced by whatever keeps the tensor cores waiting."""
    work, (owned, streamed) = work_of(spec, shape), op.owned_and_streamed(config)
    owned_heads = shape.kv_heads if op.owns_keys else shape.heads
    programs = programs_of(op, config, shape)
    programs_per_head = programs // (shape.batch * owned_heads)
    rate = op.costs.reached * gpu.peak(spec.dtype) * _matmul_efficiency(op, spec, config, gpu)
    rate *= op.instructions_factor(spec, config)
    # One program must multiply while another does its softmax: the warps of one program wait for each other.
    resident = min(max_resident, math.ceil(programs / gpu.sms))
    rate *= {1: 0.85 if config.num_warps == 4 else 1.0, 2: 1.08}.get(resident, 1.13)
    rate *= {1: 0.72, 2: 0.9, 4: 1.01}.get(config.num_stages, 1.0)  # too few stages: loads arrive late
    heads = min(config.GROUP_HEADS or shape.batch * owned_heads, shape.batch * owned_heads)
    # Data that tiles share (q, r and do of a group's heads, or k and v) is evicted from L2 before all have read it.
    row_elements, key_elements = (
        3 * shape.seqlen_q * heads * spec.group,
        2 * shape.seqlen_kv * max(1, heads // spec.group),
    )
    shared = row_elements if op.owns_keys else key_elements
    rate *= 0.95 if shared * spec.head_dim * spec.bytes_per_element > gpu.l2_bytes else 1.0
    # The best number of heads fills the card twice: fewer spread a causal triangle unevenly, more share less of L2.
    rate *= 1 - 0.012 * abs(math.log2(heads * programs_per_head / (2 * gpu.sms * max_resident)))
    if spec.causal:  # a block on the diagonal, or on a window's edge, is multiplied whole
        keys_per_query = work.flops / (
            2 * MATMULS[spec.op] * shape.batch * shape.heads * spec.head_dim * shape.seqlen_q
        )
        rate *= keys_per_query / (keys_per_query + (owned + streamed) / (1 if shape.window else 2))
    # A last wave of few programs takes as long as a full one, but long causal launches end with programs of few keys.
    waves = programs / (gpu.sms * max_resident)
    idle = 1.0 if spec.causal and waves > 2 else math.ceil(waves) / waves
    return max(work.flops / rate * idle, work.bytes / gpu.bandwidth) * 1e6


def _matmul_efficiency(op: TiledOp[TileConfig], spec: KernelSpec, config: TileConfig, gpu: Gpu) -> float:
    """The fraction of the matmul rate that matmuls of these shapes reach."""
    owned, streamed = op.owned_and_streamed(config)
    efficiency = {16: 0.75, 32: 0.87, 128: 1.06}.get(streamed, 1.0)  # narrow matmuls
    efficiency *= {16: 0.86, 32: 0.9, 64: 0.95}.get(owned, 1.0)  # every owned tile reads all tiles that it steps over
    if spec.dtype == "fp32":  # no tensor cores
        efficiency *= {16: 0.58, 32: 0.78}.get(owned, 1.0)
    else:
        if owned < 64 and gpu.capability[0] >= 9:
            efficiency *= 0.85  # the asynchronous matmuls of Hopper and Blackwell take 64 rows
        # With fewer than 16 rows per warp, warps share rows: each computes its columns, and they reduce maxima and sums
        # across warps. Sharing a row between two warps costs most; more warps wait together.
        shared_by = max(0.0, math.log2(16 * config.num_warps / owned))
        efficiency *= 0.55 ** min(1.0, shared_by) * 0.85 ** max(0.0, shared_by - 1)
    widths = [chunk.width for chunk in op.score_and_output_chunks(spec.head_dim, config.HEAD_DIM_LAYOUT)[0]]
    efficiency *= spec.head_dim / sum(widths)  # padding is multiplied too
    if config.HEAD_DIM_LAYOUT == "split":  # both programs of a tile compute its scores
        return efficiency * MATMULS[spec.op] / (MATMULS[spec.op] + SCORES[spec.op])
    return efficiency if len(widths) == 1 else 0.95 * efficiency  # narrow matmuls


def _rows_us(
    op: Op[PreprocessConfig], spec: KernelSpec, config: PreprocessConfig, shape: Shape, gpu: Gpu, max_resident: int
) -> float:
    """preprocess: bound by memory, at a rate limited by the loads in flight; each program loads its rows once."""
    work = work_of(spec, shape)
    programs = shape.batch * shape.heads * math.ceil(shape.seqlen_q / config.BLOCK_M)
    busiest = math.ceil(programs / gpu.sms)  # programs on the busiest multiprocessor
    bytes_per_program = work.bytes / (shape.batch * shape.heads * shape.seqlen_q) * config.BLOCK_M
    rate = min(0.9 * gpu.bandwidth / gpu.sms, min(max_resident, busiest) * bytes_per_program / (LATENCY_US * 1e-6))
    return busiest * bytes_per_program / rate * 1e6


def _cache_us(
    op: Op[DecodeConfig], spec: KernelSpec, config: DecodeConfig, shape: Shape, gpu: Gpu, max_resident: int
) -> float:
    """Decode: bound by memory, at a rate limited by the loads in flight on each multiprocessor; then the merge."""
    steps = math.ceil(shape.seqlen_kv / config.BLOCK_N)
    steps_per_split = math.ceil(steps / config.NUM_SPLITS)
    # With per-sequence lengths a split has at least this many steps, so there may be fewer than NUM_SPLITS.
    splits = math.ceil(steps / steps_per_split) if op.per_sequence_lengths else config.NUM_SPLITS
    tiles = shape.batch * shape.kv_heads * math.ceil(spec.group * shape.seqlen_q / config.BLOCK_H)
    step_bytes = 2 * spec.head_dim * spec.cache_bytes * config.BLOCK_N
    # Few keys per warp need many sums across threads, many keys need many registers. chain_us: the latency of a step's
    # dependent operations.
    keys = config.BLOCK_N / config.num_warps
    chain_us = 0.5 + 0.2 * keys / 32 + 0.1 * math.log2(config.num_warps)

    def stream_us(programs: float) -> float:
        """The time of `programs` resident programs on a multiprocessor, each with its split."""
        sm_bandwidth = 0.94 * gpu.bandwidth / gpu.sms / 1e6  # bytes per microsecond
        in_flight = programs * (config.num_stages - 1) * step_bytes
        rate = min(sm_bandwidth * math.tanh(in_flight / (LATENCY_US * sm_bandwidth)), programs * step_bytes / chain_us)
        return programs * steps / splits * step_bytes / rate

    per_sm = tiles * splits / gpu.sms
    rounds, rest = divmod(per_sm, max_resident)
    stream = rounds * stream_us(max_resident) + (stream_us(max(1.0, rest)) if rest else 0.0)
    stream *= 1 + 0.02 * abs(math.log2(keys / 32))
    stream += PROGRAM_US * math.ceil(per_sm / max_resident)
    if config.merge == "none" or (op.per_sequence_lengths and splits == 1):
        return stream
    state_bytes = splits * 2 * spec.head_dim * 4  # of split-KV scratch per query head, written and then read
    stream += 2 * shape.batch * shape.heads * shape.seqlen_q * state_bytes / gpu.bandwidth * 1e6
    if config.merge == "kernel":
        return stream + LAUNCH_US
    # The last split merges head by head. One program loads some 40 KB per microsecond, less with loops.
    heads = min(spec.group * shape.seqlen_q, config.BLOCK_H)
    return stream + LATENCY_US + heads * (0.2 + state_bytes / op.costs.merge_bytes_us)


_TIMES: dict[OpKind, Callable[[Any, KernelSpec, Any, Shape, Gpu, int], float]] = {
    OpKind.TILES: _tiles_us,
    OpKind.ROWS: _rows_us,
    OpKind.CACHE: _cache_us,
}


# -- Guessed resources of configs that are not compiled yet, so that the most promising configs are compiled first.
#
# Fitted to some 900 compiled tiles, and twice to decode's whole space, for Hopper in bf16 with Triton 3.6: registers
# are off by about 20 of 255, spills by a factor of two. The guess ranks configs nearly as well as the compiled
# resources do.

LATE_LOAD_REGISTERS = 100  # decode may lack this many without spills: it then loads keys and values later


def guess_us(spec: KernelSpec, config: KernelConfig, shape: Shape, gpu: Gpu) -> float:
    """The predicted microseconds of a call with a config that was not compiled."""
    return predict_us(spec, config, shape, gpu, guess_resources(spec, config, gpu))


def sorted_by_guess(spec: KernelSpec, shape: Shape, gpu: Gpu, configs: Iterable[KernelConfig]) -> list[KernelConfig]:
    """The configs, those with the shortest guessed time first."""
    return sorted(configs, key=lambda config: guess_us(spec, config, shape, gpu))


def guess_resources(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> Resources:
    """The guessed registers, spills and shared memory of a valid config."""
    op = op_of(spec)
    return _GUESSES[op.kind](op, spec, config, gpu)


def _guess_rows(op: Op[PreprocessConfig], spec: KernelSpec, config: PreprocessConfig, gpu: Gpu) -> Resources:
    return Resources(64, 0, op.shared_bytes(spec, config, gpu))  # none of these limits this kernel


def _guess_cache(op: Op[DecodeConfig], spec: KernelSpec, config: DecodeConfig, gpu: Gpu) -> Resources:
    # Two sums and two scores for each head, and keys or values loaded from shared memory, two to a register, with their
    # addresses.
    sums = 2 * config.BLOCK_H * (spec.head_dim + config.BLOCK_N)
    needed = 40 + (sums + config.BLOCK_N * spec.head_dim) // (gpu.warp_size * config.num_warps)
    most = gpu.registers_per_thread(config.num_warps)
    spills = 4 * max(0, needed - most - LATE_LOAD_REGISTERS)
    return Resources(min(most, needed), spills, op.shared_bytes(spec, config, gpu))


def _guess_tiles(op: TiledOp[TileConfig], spec: KernelSpec, config: TileConfig, gpu: Gpu) -> Resources:
    owned, streamed = op.owned_and_streamed(config)
    scored, summed = (
        sum(chunk.width for chunk in chunks)
        for chunks in op.score_and_output_chunks(spec.head_dim, config.HEAD_DIM_LAYOUT)
    )
    # Two sums for the owned tile, about three tiles of scores, a block that is loaded for the matmuls, and addresses.
    # Tiles too small for matmuls that read shared memory need the operands too.
    elements = 1.2 * 2 * owned * summed + 3.3 * owned * streamed + streamed * scored
    per_thread = elements / (gpu.warp_size * config.num_warps)
    needed = 25 + per_thread + (45 if owned < 64 else 0)
    max_registers = config.maxnreg or gpu.registers_per_thread(config.num_warps)
    lacking = max(0.0, needed - max_registers)
    lacking *= 2 if config.maxnreg else 1  # with maxnreg the innermost loop spills too
    shared = op.shared_bytes(spec, config, gpu)
    if owned >= 64 and config.num_stages > 1 and gpu.capability[0] >= 9:
        shared += op.block_bytes(spec, config)  # asynchronous matmuls run while the next block is loaded
    return Resources(int(min(needed, max_registers)), int(op.costs.spilled * lacking), shared)


_GUESSES: dict[OpKind, Callable[[Any, KernelSpec, Any, Gpu], Resources]] = {
    OpKind.TILES: _guess_tiles,
    OpKind.ROWS: _guess_rows,
    OpKind.CACHE: _guess_cache,
}
