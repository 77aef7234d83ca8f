"""The static cost model: plausible predictions and rankings."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
from sweep_samples import RECORDED

from parallax_gen.codegen.resources import Resources
from parallax_gen.memory.result import Result
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.ops.dqdr import DqDrConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.preprocess import PreprocessConfig
from parallax_gen.ops.space import every_config
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import OPS, KernelSpec
from parallax_gen.problem.work import bound_by_matmuls, work_of
from parallax_gen.tuning.search.cost_model import predict_us, resident_programs
from parallax_gen.tuning.search.recorded_sweep import read_sweep

H200 = GPUS["h200"]
FORWARD, DECODE = KernelSpec("forward", 128, "bf16", causal=True), KernelSpec("decode", 128, "bf16", group=4)
TILE = ForwardConfig(BLOCK_M=128, BLOCK_N=64, GROUP_HEADS=8, num_warps=8, num_stages=3)
SPLIT = DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=4, merge="last", num_warps=1, num_stages=4)
LEAN = Resources(registers=128, spills=0, shared_bytes=64 * 1024)
DKDV = DkDvConfig(BLOCK_M=64, BLOCK_N=128, GROUP_HEADS=8, num_warps=8, num_stages=3)
DQDR = DqDrConfig(BLOCK_M=128, BLOCK_N=64, GROUP_HEADS=8, num_warps=8, num_stages=3)
TRAINED = Shape(4, 16, 16, 4096, 4096)
CASES = [
    (FORWARD, TILE, TRAINED),
    (DECODE, SPLIT, Shape(32, 32, 8, 1, 8192)),
    (FORWARD.for_op("preprocess"), PreprocessConfig(BLOCK_M=32, num_warps=4), TRAINED),
    (FORWARD.for_op("dkdv"), DKDV, TRAINED),
    (FORWARD.for_op("dqdr"), DQDR, TRAINED),
    (
        dataclasses.replace(FORWARD.for_op("dkdv"), window=True, group=4, head_dim=96),
        dataclasses.replace(DKDV, HEAD_DIM_LAYOUT="chunked"),
        Shape(2, 32, 8, 8192, 8192, 1024),
    ),
]
IDS = [f"{spec.op}{' window' if spec.window else ''}" for spec, _, _ in CASES]


def predict(spec: KernelSpec, config: KernelConfig, shape: Shape, resources: Resources = LEAN) -> float:
    return predict_us(spec, config, shape, H200, resources)


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize(("spec", "_config", "shape"), CASES, ids=IDS)
def test_predictions_respect_the_roofline(
    spec: KernelSpec, _config: KernelConfig, shape: Shape, gpu: object, every: int
) -> None:
    card = GPUS[gpu.name]  # type: ignore[attr-defined]
    work = work_of(spec, shape)
    roof_us = 1e6 * max(work.bytes / card.bandwidth, work.flops / card.peak(spec.dtype))
    for config in itertools.islice(every_config(spec, card), 0, None, every):
        for resources in (LEAN, Resources(255, 400, card.shared_per_block)):
            time_us = predict_us(spec, config, shape, card, resources)
            assert math.isfinite(time_us)
            assert time_us > roof_us


@pytest.mark.parametrize(("spec", "config", "shape"), CASES, ids=IDS)
def test_more_work_takes_longer(spec: KernelSpec, config: KernelConfig, shape: Shape) -> None:
    longer = dataclasses.replace(shape, seqlen_kv=2 * shape.seqlen_kv)
    if spec.public_op != "decode":
        longer = dataclasses.replace(longer, seqlen_q=2 * shape.seqlen_q)
    wider = dataclasses.replace(shape, batch=2 * shape.batch)
    for more in (longer, wider):
        assert predict(spec, config, more) > 1.3 * predict(spec, config, shape)


@pytest.mark.parametrize(("spec", "config", "shape"), CASES, ids=IDS)
def test_spills_increase_the_time(spec: KernelSpec, config: KernelConfig, shape: Shape) -> None:
    times = [predict(spec, config, shape, dataclasses.replace(LEAN, spills=n)) for n in (0, 16, 128, 512)]
    assert times == sorted(set(times))


@pytest.mark.parametrize(("spec", "config", "shape"), CASES, ids=IDS)
def test_wider_elements_take_longer(spec: KernelSpec, config: KernelConfig, shape: Shape) -> None:
    assert predict(dataclasses.replace(spec, dtype="fp32"), config, shape) > predict(spec, config, shape)


def test_splits_help_a_single_sequence() -> None:
    shape = Shape(1, 8, 8, 1, 16384)
    spec = dataclasses.replace(DECODE, group=1)
    alone = dataclasses.replace(SPLIT, NUM_SPLITS=1, merge="none")
    assert predict(spec, alone, shape) > 2 * predict(spec, dataclasses.replace(SPLIT, NUM_SPLITS=32), shape)


def test_resident_blocks_are_limited_by_the_scarcest_resource() -> None:
    assert resident_programs(TILE, H200, Resources(128, 0, 1024)) == 2  # registers: 8 warps, 128 per thread
    assert resident_programs(TILE, H200, Resources(32, 0, 100 * 1024)) == 2  # shared memory
    assert resident_programs(TILE, H200, Resources(16, 0, 0)) == 8  # warps
    assert resident_programs(SPLIT, H200, Resources(16, 0, 0)) == 32  # blocks
    assert resident_programs(TILE, H200, Resources(255, 0, H200.shared_per_block)) == 1


def test_all_but_decode_and_preprocess_are_compute_bound() -> None:
    assert [op for op in OPS if not bound_by_matmuls(op)] == ["preprocess", "decode", "decode_varlen"]


@pytest.mark.parametrize(("op", "config", "rate"), [("dqdr", DQDR, 645e12), ("dkdv", DKDV, 456e12)])
def test_predictions_of_the_backward_are_near_measured_rates(op: str, config: KernelConfig, rate: float) -> None:
    """Measured rates of such kernels on an H200, in FLOPs of their own matmuls."""
    spec = FORWARD.for_op(op)
    measured_us = 1e6 * work_of(spec, TRAINED).flops / rate
    result = predict(spec, config, TRAINED, Resources(255, 10, 200 * 1024))
    assert measured_us / 1.2 < result < measured_us * 1.2


def test_dkdv_has_a_program_per_key_tile() -> None:
    """With one kv head and many query heads, dkdv has few programs and dqdr many."""
    shape = Shape(1, 64, 1, 2048, 2048)
    spec = dataclasses.replace(FORWARD, causal=False, group=64)
    few, many = predict(spec.for_op("dkdv"), DKDV, shape), predict(spec.for_op("dqdr"), DQDR, shape)
    assert few > 2 * many
    for op, config in (("dkdv", DKDV), ("dqdr", DQDR)):  # a larger tile along the program's own dimension pays
        turned = dataclasses.replace(config, BLOCK_M=config.BLOCK_N, BLOCK_N=config.BLOCK_M)
        assert predict(FORWARD.for_op(op), config, TRAINED) < predict(FORWARD.for_op(op), turned, TRAINED)


@pytest.mark.parametrize("op", ["forward", "dkdv", "dqdr"])
def test_a_window_saves_time_down_to_a_tile(op: str) -> None:
    spec = FORWARD.for_op(op)
    config = {"forward": TILE, "dkdv": DKDV, "dqdr": DQDR}[op]
    windowed = dataclasses.replace(spec, window=True)
    times = [predict(windowed, config, dataclasses.replace(TRAINED, window=w)) for w in (1, 64, 512, 2048)]
    assert times == sorted(set(times))
    assert times[2] < 0.5 * predict(spec, config, TRAINED)
    assert times[0] > times[2] / 20  # one of a tile's 64 columns is visible, and all are multiplied


def test_padding_costs_flops() -> None:
    spec = dataclasses.replace(FORWARD.for_op("dkdv"), head_dim=72)
    pieces, padded = (
        predict(spec, dataclasses.replace(DKDV, HEAD_DIM_LAYOUT=how), TRAINED) for how in ("chunked", "padded")
    )  # 64 + 16 columns, or 128
    assert padded > 1.4 * pieces


def test_preprocess_with_low_occupancy_is_latency_bound() -> None:
    spec = FORWARD.for_op("preprocess")
    resources = Resources(255, 0, H200.shared_per_block)  # one program at a time per multiprocessor
    times = [predict(spec, PreprocessConfig(m, 4), TRAINED, resources) for m in (128, 16, 4)]
    assert times == sorted(set(times))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_the_best_measured_config_is_in_the_first_fifth(path: Path) -> None:
    sweep = read_sweep(path)
    timed = [r for r in sweep.results if r.outcome in ("ok", "slow")]

    def predicted(result: Result) -> float:
        assert result.registers is not None
        assert result.spills is not None
        assert result.shared_bytes is not None
        resources = Resources(result.registers, result.spills, result.shared_bytes)
        return predict_us(sweep.place.spec, result.config, sweep.shape, GPUS[sweep.place.gpu], resources)

    order = sorted(timed, key=predicted)
    best = min(timed, key=lambda r: r.time_us or math.inf)
    assert order.index(best) < len(order) / 5
    measured = sorted(timed, key=lambda r: r.time_us or math.inf)
    places = {r.config: place for place, r in enumerate(measured)}
    off = sum((place - places[r.config]) ** 2 for place, r in enumerate(order))
    n = len(order)
    assert 1 - 6 * off / (n * (n * n - 1)) > 0.75  # Spearman's rank correlation; 0.84 to 0.93 when written


def test_warps_that_share_rows_take_longer() -> None:
    """A tile of 64 rows fits 4 warps of 16 rows. With 8 warps, pairs of warps share rows and reduce across warps."""
    small = dataclasses.replace(TILE, BLOCK_M=64, BLOCK_N=128)
    assert predict(FORWARD, dataclasses.replace(small, num_warps=4), TRAINED) < 0.8 * predict(FORWARD, small, TRAINED)


def test_large_tiles_waste_more_of_short_sequences() -> None:
    def gain(seqlen: int) -> float:
        shape = Shape(16384 // seqlen * 16, 16, 16, seqlen, seqlen)
        small, large = (dataclasses.replace(TILE, BLOCK_N=n) for n in (64, 128))
        return predict(FORWARD, small, shape) / predict(FORWARD, large, shape)

    assert gain(512) < gain(2048) < gain(16384)
