"""8-bit caches at the extremes of their range, in Triton's CPU interpreter, against the fp64 oracle.

A kernel places the bits of an 8-bit number in a 16-bit float, which scales it by a power of two, and undoes the scale
in its sums. These tests check that no value is lost on the way.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallax_gen.codegen.abi import Inputs, torch_dtype
from parallax_gen.codegen.render import render
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.oracle import verify
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.spec import KernelSpec

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("gpu_arithmetic"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:triton"),
]

CONFIG = DecodeConfig(BLOCK_N=64, BLOCK_H=8, NUM_SPLITS=2, merge="last", num_warps=1, num_stages=2)
CACHES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FORMS = [("bf16", "e4m3"), ("bf16", "e5m2"), ("fp16", "e4m3"), ("fp16", "e5m2")]
HEADS, HEAD_DIM = 2, 64


def codes(cache: str, chosen: list[int], shape: tuple[int, ...], seed: int) -> Tensor:
    """Random values among the chosen 8-bit codes."""
    draw = torch.Generator().manual_seed(seed)
    at = torch.randint(len(chosen), shape, generator=draw)
    return torch.tensor(chosen, dtype=torch.uint8)[at].view(CACHES[cache])


def check(
    dtype: str,
    cache: str,
    k: Tensor,
    v: Tensor,
    *,
    of_q: float,
    of_r: float,
    scales: tuple[float, float],
    block_n: int = 64,
) -> None:
    """Check queries and probes of these magnitudes over keys and values (keys, HEAD_DIM) with these scales."""
    spec = KernelSpec("decode_varlen", HEAD_DIM, dtype, group=HEADS, stats=True, cache_dtype=cache)
    draw = torch.Generator().manual_seed(7)
    q, r = (torch.randn(1, 1, HEADS, HEAD_DIM, generator=draw) * size for size in (of_q, of_r))
    inputs = Inputs(q.to(torch_dtype(dtype)), r.to(torch_dtype(dtype)), k[None, :, None], v[None, :, None])
    inputs.cache_seqlens = torch.tensor([len(k)], dtype=torch.int32)
    inputs.k_scale, inputs.v_scale = (torch.tensor([scale]) for scale in scales)
    for block_h in (8, 16):
        config = replace(CONFIG, BLOCK_N=block_n, BLOCK_H=block_h)
        wide = replace(spec, multi_token=True) if block_h > 8 else spec
        found = verify.launch_and_check(
            render(wide, config, GPUS["h200"]), wide, config, inputs, verify.oracle(wide, inputs)
        )
        assert found.wrong is None


@pytest.mark.parametrize(("dtype", "cache"), FORMS)
def test_all_finite_codes(dtype: str, cache: str) -> None:
    """Every finite code equally often, of both signs: half of e4m3's are below 1, one in 32 is 256 or more."""
    every = torch.arange(256, dtype=torch.uint8).view(CACHES[cache]).float()
    chosen = every.isfinite().nonzero().flatten().tolist()
    k, v = (codes(cache, chosen, (300, HEAD_DIM), seed) for seed in (1, 2))
    largest = float(every[chosen].max())
    assert largest == {"e4m3": 448.0, "e5m2": 57344.0}[cache]
    # In fp16 p·t is in units of the stored keys, and must stay below 65504.
    check(dtype, cache, k, v, of_q=1.0, of_r=0.01 if dtype == "fp16" else 1.0, scales=(4 / largest, 4 / largest))


@pytest.mark.parametrize(("dtype", "cache"), FORMS)
def test_only_subnormal_numbers(dtype: str, cache: str) -> None:
    """Down to 2^-9 in e4m3 and 2^-16 in e5m2, with scales that bring them to about 1."""
    digits = {"e4m3": 3, "e5m2": 2}[cache]
    chosen = [sign + code for sign in (0, 128) for code in range(2**digits)]
    smallest = torch.tensor([1], dtype=torch.uint8).view(CACHES[cache]).float().item()
    assert smallest == {"e4m3": 2.0**-9, "e5m2": 2.0**-16}[cache]
    k, v = (codes(cache, chosen, (300, HEAD_DIM), seed) for seed in (3, 4))
    # p·t of such keys underflows in fp16, so the probes are as large as keys this small need.
    check(dtype, cache, k, v, of_q=1.0, of_r=0.2 / smallest if dtype == "fp16" else 0.2, scales=(0.5 / smallest,) * 2)


@pytest.mark.parametrize(("dtype", "cache"), FORMS)
@pytest.mark.parametrize(
    ("of_q", "of_r", "k_scale"),
    [(8.0, 0.1, 1.0), (1e4, 0.1, 1e-4), (1.0, 50.0, 1.0), (1e-4, 1e-4, 1e4), (1e-7, 1e-7, 1.0)],
    ids=["q times 8", "q of 1e4 beside a scale", "r of 50", "q and r of 1e-4 beside a scale", "q and r near 0"],
)
def test_queries_and_probes_of_any_magnitude(dtype: str, cache: str, of_q: float, of_r: float, k_scale: float) -> None:
    draw = torch.Generator().manual_seed(5)
    k, v = (torch.randn(300, HEAD_DIM, generator=draw).to(CACHES[cache]) for _ in range(2))
    check(dtype, cache, k, v, of_q=of_q, of_r=of_r, scales=(k_scale, 1.0))


@pytest.mark.parametrize("cache", ["e4m3", "e5m2"])
@pytest.mark.parametrize("size", [1e4, 1e8])
def test_bf16_probes_beyond_the_range_of_fp16(cache: str, size: float) -> None:
    draw = torch.Generator().manual_seed(6)
    k, v = (torch.randn(300, HEAD_DIM, generator=draw).to(CACHES[cache]) for _ in range(2))
    check("bf16", cache, k, v, of_q=1.0, of_r=size, scales=(1.0, 1.0))
    check("bf16", cache, k, v, of_q=size, of_r=0.1, scales=(1 / size, 1.0))


@pytest.mark.parametrize(("dtype", "cache"), FORMS)
def test_many_keys_of_small_weight(dtype: str, cache: str) -> None:
    draw = torch.Generator().manual_seed(8)
    k, v = (torch.randn(6000, HEAD_DIM, generator=draw).to(CACHES[cache]) for _ in range(2))
    check(dtype, cache, k, v, of_q=0.1, of_r=0.1, scales=(1.0, 1.0), block_n=128)
