"""The work of a call: operations and bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import MATMULS, work_of

NO_DEADLINE = settings(deadline=None)  # a busy machine must not fail the tests


@pytest.mark.parametrize(
    ("spec", "shape", "flops", "size"),
    [
        # 8·B·H·L²·D FLOP; q, r, k, v and o once each
        (
            KernelSpec("forward", 128, "bf16"),
            Shape(4, 16, 16, 4096, 4096),
            8 * 4 * 16 * 4096**2 * 128,
            5 * 2 * 4 * 16 * 4096 * 128,
        ),
        # half of that, and v̄ (bf16), lse and t̄ (fp32) are written as well
        (
            KernelSpec("forward", 128, "bf16", causal=True, stats=True),
            Shape(4, 16, 16, 4096, 4096),
            4 * 4 * 16 * 4096**2 * 128,
            6 * 2 * 4 * 16 * 4096 * 128 + 2 * 4 * 4 * 16 * 4096,
        ),
        # queries at the end of a longer cache: a rectangle plus a triangle
        (
            KernelSpec("forward", 64, "fp16", causal=True),
            Shape(1, 1, 1, 10, 100),
            8 * 64 * (10 * 90 + 10 * 10 / 2),
            2 * 64 * (3 * 10 + 2 * 100),
        ),
        # more queries than keys: the first ninety see no key
        (
            KernelSpec("forward", 64, "fp32", causal=True),
            Shape(1, 1, 1, 100, 10),
            8 * 64 * 10 * 10 / 2,
            4 * 64 * (3 * 100 + 2 * 10),
        ),
        # decode with 4 query heads per kv head: k and v are read once for the group
        (
            KernelSpec("decode", 128, "bf16", group=4),
            Shape(2, 32, 8, 1, 8192),
            8 * 2 * 32 * 8192 * 128,
            2 * (2 * 2 * 8 * 8192 * 128 + 3 * 2 * 32 * 128),
        ),
        # preprocess: two dot products per row; reads do, o, v̄, lse and t̄, writes four fp32 row_stats
        (
            KernelSpec("preprocess", 96, "bf16"),
            Shape(2, 8, 8, 1000, 1000),
            2 * 2 * 2 * 8 * 1000 * 96,
            2 * 8 * 1000 * (3 * 2 * 96 + 2 * 4 + 4 * 4),
        ),
        # dkdv: six matmuls; q, r, do and the four row_stats of preprocess, k, v, dk and dv
        (
            KernelSpec("dkdv", 128, "bf16", group=4),
            Shape(2, 32, 8, 1000, 3000),
            6 * 2 * 2 * 32 * 1000 * 3000 * 128,
            2 * 128 * (3 * 2 * 32 * 1000 + 4 * 2 * 8 * 3000) + 16 * 2 * 32 * 1000,
        ),
        # dqdr: five; q, r, do, dq, dr and the four row_stats, k and v
        (
            KernelSpec("dqdr", 128, "tf32", group=4, causal=True),
            Shape(2, 32, 8, 4096, 4096),
            5 * 2 * 2 * 32 * 4096**2 / 2 * 128,
            4 * 128 * (5 * 2 * 32 * 4096 + 2 * 2 * 8 * 4096) + 16 * 2 * 32 * 4096,
        ),
        # a window of 1000 leaves out the triangle of keys further away
        (
            KernelSpec("forward", 64, "bf16", causal=True, window=True),
            Shape(1, 1, 1, 4096, 4096, 1000),
            8 * 64 * (4096**2 - (4096 - 1000) ** 2) / 2,
            5 * 2 * 64 * 4096,
        ),
        # a window of all keys leaves out nothing
        (
            KernelSpec("forward", 64, "bf16", causal=True, window=True),
            Shape(1, 1, 1, 4096, 4096, 4096),
            8 * 64 * 4096**2 / 2,
            5 * 2 * 64 * 4096,
        ),
        # an fp8 cache: one byte per element of k and v
        (
            KernelSpec("decode_varlen", 128, "bf16", group=4, cache_dtype="e4m3"),
            Shape(2, 8, 2, 1, 4096),
            8 * 2 * 8 * 128 * 4096,
            2 * 2 * 2 * 4096 * 128 + 2 * 3 * 2 * 8 * 128,
        ),
        # a window over a cache: 4 queries with a window of 100 see the last 103 keys
        (
            KernelSpec("decode_varlen", 128, "bf16", group=4, causal=True, window=True, multi_token=True),
            Shape(2, 8, 2, 4, 4096, 100),
            8 * 2 * 8 * 128 * 4 * 100,
            2 * (2 * 2 * 2 * 103 * 128 + 2 * 4 * 3 * 8 * 128),
        ),
    ],
)
def test_work(spec: KernelSpec, shape: Shape, flops: float, size: float) -> None:
    work = work_of(spec, shape)
    assert (work.flops, work.bytes) == (flops, size)


LENGTH = st.integers(1, 40)


@NO_DEADLINE
@given(st.sampled_from(sorted(MATMULS)), st.booleans(), LENGTH, LENGTH, st.just(0) | st.integers(1, 50))
def test_flops_against_a_count_of_visible_pairs(
    op: str, causal: bool, seqlen_q: int, seqlen_kv: int, window: int
) -> None:
    """Visible pairs are counted one by one. On the diagonal a pair counts half, unless a window cuts the row."""
    window *= causal
    window *= op != "decode"
    causal &= op != "decode"
    spec = KernelSpec(op, 64, "bf16", 2, causal=causal, window=window > 0, multi_token=op == "decode_varlen")
    pairs = 0.0
    for i in range(seqlen_q):
        last = seqlen_kv - seqlen_q + i if causal else seqlen_kv - 1
        first = max(0, last - window + 1) if window else 0
        visible = [j for j in range(seqlen_kv) if first <= j <= last]
        pairs += len(visible) - 0.5 * (causal and visible != [] and first == last + 1 - len(visible) == 0)
    work = work_of(spec, Shape(3, 4, 2, seqlen_q, seqlen_kv, window))
    assert work.flops == MATMULS[op] * 2 * 64 * 3 * 4 * pairs
