"""The static model: sane, as far as ranking goes."""

from __future__ import annotations

import dataclasses
import math

import pytest

from parallax_gen.codegen.resources import Resources
from parallax_gen.problem.config import DecodeConfig, ForwardConfig, KernelConfig
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape, work_of
from parallax_gen.problem.space import every_config
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.model import predict_us, resident_blocks

H200 = GPUS["h200"]
FORWARD, DECODE = KernelSpec("forward", 128, "bf16", causal=True), KernelSpec("decode", 128, "bf16", group=4)
TILE = ForwardConfig(BLOCK_M=128, BLOCK_N=64, HEAD_GROUP=8, num_warps=8, num_stages=3)
SPLIT = DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=4, merge="last", num_warps=1, num_stages=4)
LEAN = Resources(registers=128, spills=0, shared_bytes=64 * 1024)
CASES = [
    (FORWARD, TILE, Shape(4, 16, 16, 4096, 4096)),
    (DECODE, SPLIT, Shape(32, 32, 8, 1, 8192)),
]


def predict(spec: KernelSpec, config: KernelConfig, shape: Shape, resources: Resources = LEAN) -> float:
    return predict_us(spec, config, shape, H200, resources)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize(("spec", "_config", "shape"), CASES)
def test_every_time_is_positive_and_below_no_roof(
    spec: KernelSpec, _config: KernelConfig, shape: Shape, gpu: object
) -> None:
    card = GPUS[gpu.name]  # type: ignore[attr-defined]
    work = work_of(spec, shape)
    roof_us = 1e6 * max(work.bytes / card.bandwidth, work.flops / card.peak(spec.dtype))
    for config in every_config(spec, card):
        for resources in (LEAN, Resources(255, 400, card.shared_per_block)):
            time_us = predict_us(spec, config, shape, card, resources)
            assert math.isfinite(time_us)
            assert time_us > roof_us


@pytest.mark.parametrize(("spec", "config", "shape"), CASES)
def test_more_work_takes_longer(spec: KernelSpec, config: KernelConfig, shape: Shape) -> None:
    longer = dataclasses.replace(shape, seqlen_kv=2 * shape.seqlen_kv)
    if spec.op == "forward":
        longer = dataclasses.replace(longer, seqlen_q=2 * shape.seqlen_q)
    wider = dataclasses.replace(shape, batch=2 * shape.batch)
    for more in (longer, wider):
        assert predict(spec, config, more) > 1.3 * predict(spec, config, shape)


@pytest.mark.parametrize(("spec", "config", "shape"), CASES)
def test_spills_cost(spec: KernelSpec, config: KernelConfig, shape: Shape) -> None:
    times = [predict(spec, config, shape, dataclasses.replace(LEAN, spills=n)) for n in (0, 16, 128, 512)]
    assert times == sorted(set(times))


@pytest.mark.parametrize(("spec", "config", "shape"), CASES)
def test_twice_as_wide_elements_take_longer(spec: KernelSpec, config: KernelConfig, shape: Shape) -> None:
    assert predict(dataclasses.replace(spec, dtype="fp32"), config, shape) > predict(spec, config, shape)


def test_one_sequence_needs_splits() -> None:
    shape = Shape(1, 8, 8, 1, 16384)
    spec = dataclasses.replace(DECODE, group=1)
    alone = dataclasses.replace(SPLIT, NUM_SPLITS=1, merge="none")
    assert predict(spec, alone, shape) > 2 * predict(spec, dataclasses.replace(SPLIT, NUM_SPLITS=32), shape)


def test_resident_blocks_are_bound_by_the_scarcest() -> None:
    assert resident_blocks(TILE, H200, Resources(128, 0, 1024)) == 2  # registers: 8 warps of 128 a thread
    assert resident_blocks(TILE, H200, Resources(32, 0, 100 * 1024)) == 2  # shared memory
    assert resident_blocks(TILE, H200, Resources(16, 0, 0)) == 8  # warps
    assert resident_blocks(SPLIT, H200, Resources(16, 0, 0)) == 32  # blocks
    assert resident_blocks(TILE, H200, Resources(255, 0, H200.shared_per_block)) == 1
