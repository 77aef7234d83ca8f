"""The arguments of a launch: scratch as large as its grid needs, and tensors in the kernels' formats."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

import pytest
import torch
from strategies import GOLDEN

from parallax_gen.codegen.abi import as_int32, empty_inputs, prepare
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import render
from parallax_gen.ops.base import KernelConfig, Scratch, op_of
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.ops.dqdr import DqDrConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.tile_form import programs_of
from parallax_gen.ops.tiles import TileConfig
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

GPU = GPUS["h200"]
DECODE_VARLEN = KernelSpec("decode_varlen", 64, "fp16")
MULTI_TOKEN = replace(DECODE_VARLEN, multi_token=True, group=3)
CONFIG = DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=3, merge="last", num_warps=2, num_stages=3)


class RecordingKernel:
    """A fake kernel that records the grid of its launch."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grid = grid
        return lambda *_, **__: None


def scratch_of(spec: KernelSpec, config: KernelConfig, *sizes: int) -> Scratch:
    return op_of(spec).scratch(spec, config, *sizes)


def grid_of(spec: KernelSpec, config: KernelConfig, shape: Shape) -> tuple[int, ...]:
    module, recorded = load(render(spec, config, GPU)), RecordingKernel()
    name = f"{spec.op}_kernel"
    kernel = getattr(module, name)
    setattr(module, name, recorded)
    try:
        module.launch(*prepare(spec, config, empty_inputs(spec, shape, "cpu")).arguments(1.0))
    finally:
        setattr(module, name, kernel)
    return recorded.grid


@pytest.mark.parametrize(
    ("spec", "block_h", "shape", "tiles", "groups", "rows"),
    [
        (DECODE_VARLEN, 8, Shape(5, 2, 2, 1, 100), 5, 1, 1),
        (DECODE_VARLEN, 8, Shape(33, 2, 2, 1, 100), 33, 1, 1),
        (replace(DECODE_VARLEN, group=4), 8, Shape(5, 8, 2, 1, 100), 5, 1, 4),
        (replace(DECODE_VARLEN, group=12), 8, Shape(5, 24, 2, 1, 100), 5, 2, 8),
        (replace(DECODE_VARLEN, group=12), 16, Shape(5, 24, 2, 1, 100), 5, 1, 12),
        (replace(DECODE_VARLEN, head_dim=40, group=4, page_size=16), 8, Shape(5, 8, 2, 1, 100), 5, 1, 4),
        (MULTI_TOKEN, 8, Shape(5, 6, 2, 7, 100), 15, 1, 8),  # 21 (query, head) pairs a sequence
        (MULTI_TOKEN, 64, Shape(5, 6, 2, 7, 100), 5, 1, 64),
        (replace(MULTI_TOKEN, varlen=True), 16, Shape(5, 6, 2, 7, 100), 10, 1, 16),
        (replace(MULTI_TOKEN, varlen=True, stats=True, cache_dtype="e4m3"), 16, Shape(1, 3, 1, 1, 100), 1, 1, 16),
    ],
)
@pytest.mark.parametrize("splits", [1, 3, 16])
def test_decode_varlen_launches_a_program_per_work_item(
    spec: KernelSpec, block_h: int, shape: Shape, tiles: int, groups: int, rows: int, splits: int
) -> None:
    """Each tile has `splits` splits, plus spare splits (one for eight tiles), for each of the `groups` of heads."""
    config = replace(CONFIG, BLOCK_H=block_h, NUM_SPLITS=splits)
    programs = groups * (tiles * splits + -(-tiles // 8)) * shape.kv_heads
    assert grid_of(spec, config, shape) == (programs,)
    found = scratch_of(spec, config, shape.batch, shape.kv_heads, shape.seqlen_q)
    assert found == Scratch(floats=programs * rows * (2 * spec.head_dim + 4), counters=programs)
    if not spec.multi_token:  # a second kernel may merge these, without an arrival counter
        config = replace(config, merge="kernel")
        assert scratch_of(spec, config, shape.batch, shape.kv_heads) == replace(found, counters=0)


@pytest.mark.parametrize("shape", [Shape(3, 6, 2, 65, 130), Shape(1, 3, 1, 64, 128)])
@pytest.mark.parametrize(("head_dim", "layout"), [(64, "native"), (256, "split")])
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize(("op", "config"), [("forward", ForwardConfig), ("dkdv", DkDvConfig), ("dqdr", DqDrConfig)])
def test_a_tiled_launch_has_as_many_programs_as_computed(
    op: str, config: type[TileConfig], varlen: bool, head_dim: int, layout: str, shape: Shape
) -> None:
    spec = KernelSpec(op, head_dim, "bf16", group=3, causal=True, varlen=varlen, stats=op == "forward")
    tiles = config(64, 32, 4, 4, 2, layout)
    tiled_op: Any = op_of(spec)
    assert (programs_of(tiled_op, tiles, shape),) == grid_of(spec, tiles, shape)


def test_prepared_scratch_has_the_needed_size() -> None:
    spec, shape = replace(MULTI_TOKEN, varlen=True), Shape(5, 6, 2, 7, 100)
    states, counters = prepare(spec, CONFIG, empty_inputs(spec, shape, "cpu")).scratch
    needed = scratch_of(spec, CONFIG, 5, 2, 7)
    assert (states.numel(), counters.numel()) == (needed.floats, needed.counters)
    assert (states.dtype, counters.dtype) == (torch.float32, torch.int32)
    assert not counters.any()


def test_a_launch_without_splits_needs_no_scratch() -> None:
    unsplit = replace(CONFIG, NUM_SPLITS=1, merge="none")
    assert scratch_of(KernelSpec("decode", 64, "fp16"), unsplit, 5, 2) == Scratch()
    assert scratch_of(KernelSpec("forward", 64, "fp16"), ForwardConfig(64, 32, 1, 4, 2), 5, 2) == Scratch()
    assert (
        scratch_of(DECODE_VARLEN, replace(CONFIG, NUM_SPLITS=1), 5, 2) != Scratch()
    )  # one split on average, so some sequences have several


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_an_fp8_cache_is_passed_as_packed_int32(name: str, dtype: torch.dtype) -> None:
    spec = replace(DECODE_VARLEN, cache_dtype=name)
    inputs = empty_inputs(spec, Shape(3, 2, 2, 1, 5), "cpu")
    assert inputs.k.dtype == inputs.v.dtype == dtype
    q, r, k, v, *_ = prepare(spec, CONFIG, inputs).arguments(1.0)
    assert q.dtype == r.dtype == torch.float16  # type: ignore[attr-defined]
    assert k.dtype == v.dtype == torch.int32  # type: ignore[attr-defined]
    assert k.shape == (3, 5, 2, 16)  # type: ignore[attr-defined]
    assert k.data_ptr() == inputs.k.data_ptr()  # type: ignore[attr-defined]


def test_packed_fp8_is_little_endian() -> None:
    numbers = torch.tensor([1.0, -2.0, 0.5, 448.0]).to(torch.float8_e4m3fn)
    bits = numbers.view(torch.uint8).tolist()
    assert [word & 0xFFFFFFFF for word in as_int32(numbers).tolist()] == [int.from_bytes(bits, "little")]


@pytest.mark.parametrize("name", GOLDEN)
def test_launch_parameters_are_those_of_the_op(name: str) -> None:
    """Names and order of the parameters."""
    spec, config = GOLDEN[name].spec, GOLDEN[name].config
    tree = ast.parse(render(spec, config, GPU).text)
    (launch,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "launch")
    op, scratch = op_of(spec), scratch_of(spec, config, 5, 2, 7)
    needed = ["scratch"] * (scratch.floats > 0) + ["arrival_counters"] * (scratch.counters > 0)
    tensors = [op.launch_names.get(n, n) for n in (*op.inputs(spec), *op.written(spec), *op.lengths(spec))]
    names = [*tensors, *needed, "softmax_scale", *["softcap"] * spec.softcap, *op.sizes(spec)]
    assert [argument.arg for argument in launch.args.args] == names
