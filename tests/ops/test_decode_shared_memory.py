"""The bound on decode's shared memory agrees with compiled kernels, and its defaults are the first that fit a card."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.space import default_config, shared_bytes, why_invalid
from parallax_gen.problem.hardware import GPUS, KIB
from parallax_gen.problem.shapes import Bucket, representative
from parallax_gen.problem.spec import KernelSpec

DECODE_VARLEN = KernelSpec("decode_varlen", 128, "bf16")
MULTI_TOKEN = KernelSpec("decode_varlen", 128, "bf16", 4, causal=True, multi_token=True)
FP8 = replace(MULTI_TOKEN, cache_dtype="e4m3")
TF32 = replace(MULTI_TOKEN, dtype="tf32")


@pytest.mark.parametrize(
    ("gpu", "spec", "tile", "took"),
    [  # tile: BLOCK_N, BLOCK_H, num_warps, num_stages. Matmuls of 64 rows and 4 warps are asynchronous from Hopper on
        ("rtx4090", MULTI_TOKEN, (64, 8, 1, 2), 36864),
        ("rtx4090", MULTI_TOKEN, (32, 16, 2, 3), 43008),
        ("rtx4090", MULTI_TOKEN, (64, 64, 8, 3), 115200),
        ("rtx4090", MULTI_TOKEN, (128, 64, 8, 2), 131072),
        ("rtx4090", replace(FP8, page_size=256), (128, 16, 2, 2), 40960),
        ("rtx4090", FP8, (128, 32, 4, 2), 49152),
        ("rtx4090", replace(TF32, page_size=1), (64, 32, 4, 2), 114944),
        ("rtx4090", replace(TF32, head_dim=96), (64, 32, 2, 2), 114688),
        ("rtx4090", replace(DECODE_VARLEN, head_dim=96, dtype="tf32", group=71), (128, 8, 1, 3), 270336),
        ("h200", MULTI_TOKEN, (64, 16, 1, 3), 73728),
        ("h200", MULTI_TOKEN, (16, 32, 2, 3), 34816),
        ("h200", MULTI_TOKEN, (64, 64, 8, 3), 131072),
        ("h200", TF32, (32, 64, 4, 2), 131072),
        ("h200", replace(TF32, head_dim=64, page_size=256), (128, 8, 4, 2), 77824),
        ("h200", FP8, (64, 32, 8, 2), 49152),
        ("h200", replace(FP8, head_dim=192, cache_dtype="e5m2", page_size=1), (32, 8, 1, 2), 24832),
        ("b200", MULTI_TOKEN, (64, 8, 1, 3), 69632),
        ("b200", MULTI_TOKEN, (128, 16, 8, 3), 147456),
        ("b200", MULTI_TOKEN, (64, 64, 8, 3), 196640),
        ("b200", TF32, (32, 32, 4, 2), 131104),
        ("b200", TF32, (128, 64, 8, 2), 458784),
        ("b200", replace(TF32, head_dim=64), (64, 64, 8, 3), 163872),
        ("b200", replace(TF32, head_dim=256), (32, 32, 4, 2), 213024),
        ("b200", FP8, (64, 32, 8, 2), 65600),
        ("b200", replace(FP8, head_dim=64), (128, 64, 4, 2), 114752),
        ("b200", replace(FP8, head_dim=256), (64, 64, 8, 2), 163904),
        ("b200", FP8, (128, 64, 8, 2), 163904),
        ("b200", replace(DECODE_VARLEN, head_dim=192, cache_dtype="e5m2"), (32, 8, 2, 2), 25600),
    ],
)
def test_the_bound_on_shared_memory_agrees_with_compiled_kernels(
    gpu: str, spec: KernelSpec, tile: tuple[int, int, int, int], took: int
) -> None:
    """Bytes of kernels compiled with Triton 3.9. The bound adds what warps and threads may exchange: on Blackwell whole
    accumulators, of which the compiler may exchange a part at a time."""
    keys, rows, warps, stages = tile
    config = DecodeConfig(keys, rows, 4, "last", warps, stages)
    assert took <= shared_bytes(spec, config, GPUS[gpu]) <= took + (33 if gpu == "b200" else 1) * KIB
    if took > GPUS[gpu].shared_per_block:
        assert "shared memory" in str(why_invalid(spec, config, GPUS[gpu]))


@pytest.mark.parametrize(
    ("gpu", "spec", "over", "tile"),
    [  # over: the former first tile, which failed on a card in the first call. BLOCK_N, BLOCK_H, num_warps, num_stages
        ("rtx4090", MULTI_TOKEN, (64, 64, 8, 3), (64, 64, 8, 2)),
        ("rtx3090", replace(MULTI_TOKEN, page_size=16, varlen=True), (64, 64, 8, 3), (64, 64, 8, 2)),
        ("rtx5090", replace(MULTI_TOKEN, head_dim=96, dtype="fp16"), (64, 64, 8, 3), (64, 64, 8, 2)),
        ("rtx4090", replace(MULTI_TOKEN, head_dim=256), (64, 64, 8, 2), (32, 32, 4, 2)),
        ("rtx4090", TF32, (64, 64, 8, 2), (32, 32, 4, 2)),
        ("rtx4090", replace(TF32, head_dim=256), (32, 16, 2, 2), (32, 8, 2, 2)),
        ("rtx4090", replace(FP8, head_dim=256), (64, 64, 8, 3), (32, 32, 4, 2)),
        ("rtx4090", replace(DECODE_VARLEN, group=71), (64, 64, 8, 3), (64, 64, 8, 2)),
        ("rtx4090", replace(DECODE_VARLEN, head_dim=256), (32, 8, 1, 4), (32, 8, 2, 3)),
        ("rtx4090", KernelSpec("decode", 128, "tf32"), (32, 8, 1, 4), (32, 8, 2, 3)),
        ("a100", replace(MULTI_TOKEN, head_dim=192), (64, 64, 8, 3), (64, 64, 8, 2)),
        ("h200", replace(MULTI_TOKEN, head_dim=256), (64, 64, 8, 3), (64, 64, 8, 2)),
        ("a100", replace(TF32, head_dim=256), (64, 64, 8, 2), (32, 32, 4, 2)),
        ("h200", replace(TF32, head_dim=256), (64, 64, 8, 2), (32, 16, 2, 3)),
        ("b200", TF32, (64, 64, 8, 3), (64, 32, 4, 2)),
    ],
)
def test_defaults_of_decode_are_the_first_tiles_that_fit(
    gpu: str, spec: KernelSpec, over: tuple[int, ...], tile: tuple[int, ...]
) -> None:
    queries = 512 if spec.multi_token else 1
    found = default_config(spec, representative(Bucket(16, queries, 4096), spec.group), GPUS[gpu])
    assert isinstance(found, DecodeConfig)
    assert (found.BLOCK_N, found.BLOCK_H, found.num_warps, found.num_stages) == tile
    keys, rows, warps, stages = over
    old = replace(found, BLOCK_N=keys, BLOCK_H=rows, num_warps=warps, num_stages=stages)
    assert "shared memory" in str(why_invalid(spec, old, GPUS[gpu]))
