"""The config space and the default config: proposals are valid, and every call has a default."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import compatible_flags

from parallax_gen.errors import ArgumentError
from parallax_gen.ops.base import OPS_BY_NAME, KernelConfig, OpKind
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.ops.dqdr import DqDrConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.head_dim import chunks_of, head_dim_layouts
from parallax_gen.ops.preprocess import PreprocessConfig
from parallax_gen.ops.space import (
    coerce,
    default_config,
    every_config,
    knobs_of,
    neighbours,
    promising_configs,
    shared_bytes,
    why_invalid,
)
from parallax_gen.problem.hardware import GIB, GPUS, KIB, Gpu, recognise
from parallax_gen.problem.shapes import Bucket, representative
from parallax_gen.problem.spec import CACHE_DTYPES, DTYPES, FLAGS, LARGEST_HEAD_DIM, OPS, KernelSpec

H200 = GPUS["h200"]
# All known GPUs, a MIG slice, and a GPU of an unknown architecture, which gets the lowest of all limits.
ANY_GPU = (
    *GPUS.values(),
    recognise("NVIDIA H100 80GB HBM3", (9, 0), 16, 10 * GIB),
    recognise("NVIDIA Next", (13, 0), 200, 300 * GIB),
)
DTYPES_OF = {op: tuple(d for d in DTYPES if d != "tf32" or op != "preprocess") for op in OPS}
CACHES = ("decode", "decode_varlen")
HEAD_DIMS = range(8, LARGEST_HEAD_DIM + 1, 8)


@st.composite
def specs(draw: st.DrawFn) -> KernelSpec:
    """Any valid spec."""
    op = draw(st.sampled_from(OPS))
    head_dim, dtype = draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from(DTYPES_OF[op]))
    flags = compatible_flags(op, {name: draw(st.booleans()) for name, ops in FLAGS.items() if op in ops})
    spec = KernelSpec(op, head_dim, dtype, 1 if op == "preprocess" else draw(st.integers(1, 130)), **flags)
    if op == "decode_varlen" and spec.bytes_per_element == 2:
        spec = replace(spec, cache_dtype=draw(st.sampled_from(CACHE_DTYPES)))
    return spec


def one_query(spec: KernelSpec) -> bool:
    """Whether the spec's shapes have one query a sequence."""
    return spec.public_op == "decode" and not spec.multi_token


POWERS = st.integers(0, 17).map(lambda n: 1 << n)


def has_matmuls(gpu: Gpu, spec: KernelSpec) -> bool:
    """Whether a GPU has matmuls in the spec's dtype; gfx950 has none in tf32, and calls there run fp32 instead."""
    return spec.dtype != "tf32" or gpu.has_tf32


SPECS_AND_GPUS = st.tuples(specs(), st.sampled_from(ANY_GPU)).filter(lambda drawn: has_matmuls(drawn[1], drawn[0]))


@given(SPECS_AND_GPUS, POWERS, POWERS, POWERS, POWERS)
def test_every_call_has_a_valid_default(spec_and_gpu, kv_rows, seqlen_q, seqlen_kv, window) -> None:
    spec, gpu = spec_and_gpu
    bucket = Bucket(kv_rows, 1 if one_query(spec) else seqlen_q, seqlen_kv, window if spec.window else 0)
    config = default_config(spec, representative(bucket, spec.group), gpu)
    assert why_invalid(spec, config, gpu) is None


@given(SPECS_AND_GPUS, POWERS, POWERS, POWERS)
def test_a_search_begins_with_the_default_and_distinct_configs(spec_and_gpu, kv_rows, seqlen_q, seqlen_kv) -> None:
    spec, gpu = spec_and_gpu
    bucket = Bucket(kv_rows, 1 if one_query(spec) else seqlen_q, seqlen_kv, 128 if spec.window else 0)
    shape = representative(bucket, spec.group)
    found = promising_configs(spec, shape, gpu)
    assert found[0] == default_config(spec, shape, gpu)
    assert len(set(found)) == len(found)
    assert all(why_invalid(spec, config, gpu) is None for config in found)


def test_a_search_tries_every_head_dim_layout_and_several_group_heads() -> None:
    spec = KernelSpec("dqdr", 96, "bf16", causal=True)
    found = promising_configs(spec, representative(Bucket(128, 4096, 4096), 1), H200)
    assert {config.HEAD_DIM_LAYOUT for config in found} == {"chunked", "padded"}
    assert {1, 4, 16, 0} <= {config.GROUP_HEADS for config in found}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_every_head_dim_has_a_default(op: str, dtype: str) -> None:
    """All that the test above draws from, except for what does not affect a default's validity."""
    shapes = [representative(Bucket(rows, 1 if op in CACHES else n, n), 1) for rows, n in ((1, 64), (64, 8192))]
    for head_dim in HEAD_DIMS if dtype in DTYPES_OF[op] else ():
        spec = KernelSpec(op, head_dim, dtype)
        for gpu in (gpu for gpu in ANY_GPU if has_matmuls(gpu, spec)):
            for shape in shapes:
                assert why_invalid(spec, default_config(spec, shape, gpu), gpu) is None


@given(SPECS_AND_GPUS)
def test_neighbours_are_valid_and_one_knob_away(spec_and_gpu) -> None:
    spec, gpu = spec_and_gpu
    config = default_config(spec, representative(Bucket(8, 1 if one_query(spec) else 4096, 4096), spec.group), gpu)
    found = neighbours(spec, config, gpu)
    assert found
    assert len(set(found)) == len(found)
    for near in found:
        assert why_invalid(spec, near, gpu) is None
        mine, other = asdict(config), asdict(near)
        differ = {name for name in mine if mine[name] != other[name]}
        assert len(differ - {"merge"}) <= 1  # merge depends on the number of splits
        assert differ
        for knob in knobs_of(spec):
            if knob.name in differ - {"merge"}:
                assert other[knob.name] in knob.neighbours(mine[knob.name])


@pytest.mark.parametrize("head_dim", [96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_every_config_is_valid_and_listed_once(op: str, dtype: str, head_dim: int) -> None:
    if dtype not in DTYPES_OF[op]:
        with pytest.raises(ArgumentError):
            KernelSpec(op, head_dim, dtype)
        return
    spec = KernelSpec(op, head_dim, dtype)
    found = list(every_config(spec, H200))
    every = itertools.product(*(knob.values for knob in OPS_BY_NAME[op].knobs))
    names = [knob.name for knob in OPS_BY_NAME[op].knobs]
    valid = {OPS_BY_NAME[op].config(**dict(zip(names, values, strict=True))) for values in every}
    assert set(found) == {config for config in valid if why_invalid(spec, config, H200) is None}
    assert len(set(found)) == len(found) > (10 if op == "preprocess" else 20)


def test_knobs_omit_values_that_a_spec_cannot_use() -> None:
    def values(spec: KernelSpec, name: str) -> tuple[object, ...]:
        return next(knob.values for knob in knobs_of(spec) if knob.name == name)

    assert values(KernelSpec("decode", 128, "bf16", group=4), "BLOCK_H") == (8,)
    assert values(KernelSpec("decode", 128, "bf16", group=9), "BLOCK_H") == (8, 16)
    assert 16 not in values(KernelSpec("forward", 128, "bf16"), "BLOCK_N")
    assert 16 in values(KernelSpec("forward", 128, "fp32"), "BLOCK_N")
    assert 16 in values(KernelSpec("forward", 128, "tf32"), "BLOCK_N")
    for op in (name for name, op in OPS_BY_NAME.items() if op.kind is OpKind.TILES):
        assert values(KernelSpec(op, 128, "bf16"), "HEAD_DIM_LAYOUT") == ("native",)
        assert values(KernelSpec(op, 96, "bf16"), "HEAD_DIM_LAYOUT") == ("chunked", "padded")
        assert values(KernelSpec(op, 8, "bf16"), "HEAD_DIM_LAYOUT") == ("padded",)
        assert values(KernelSpec(op, 256, "bf16"), "HEAD_DIM_LAYOUT") == ("native", "split")


def test_split_heads_fit_in_registers_where_native_ones_do_not() -> None:
    config = ForwardConfig(128, 64, 1, 8, 2)
    assert "320 registers" in str(why_invalid(KernelSpec("forward", 256, "bf16"), config, H200))
    assert why_invalid(KernelSpec("forward", 256, "bf16"), replace(config, HEAD_DIM_LAYOUT="split"), H200) is None
    narrow = DkDvConfig(32, 64, 1, 4, 3, maxnreg=168)
    assert why_invalid(KernelSpec("dkdv", 64, "bf16"), narrow, H200) is None
    assert "maxnreg" in str(
        why_invalid(KernelSpec("dkdv", 64, "bf16"), replace(narrow, maxnreg=128, BLOCK_M=128), H200)
    )


@pytest.mark.parametrize("head_dim", range(8, LARGEST_HEAD_DIM + 1, 8))
def test_head_dim_layouts_are_those_with_different_tiles(head_dim: int) -> None:
    tiles = {form: [chunk.width for chunk in chunks_of(head_dim, form)] for form in ("native", "chunked", "padded")}
    padded = any(chunk.padded for chunk in chunks_of(head_dim, "padded"))
    assert ("native" in head_dim_layouts(head_dim)) == (not padded)
    assert ("chunked" in head_dim_layouts(head_dim)) == (tiles["chunked"] != tiles["padded"])
    assert ("padded" in head_dim_layouts(head_dim)) == padded


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ForwardConfig(128, 64, 1, 4, 2), "registers"),
        (ForwardConfig(32, 32, 1, 8, 2), "a 32x32 tile is too small for 8 warps"),
        (ForwardConfig(64, 64, 1, 8, 2), "a 64x64 tile is too small for 8 warps"),
        (ForwardConfig(64, 16, 1, 4, 2), "a 64x16 tile is too small for 4 warps"),
        (ForwardConfig(100, 64, 1, 4, 2), "BLOCK_M is 100"),
        (ForwardConfig(64, 64, 1, 4, 2, "chunked"), "HEAD_DIM_LAYOUT 'chunked' cannot be combined with head_dim 128"),
        (ForwardConfig(64, 64, 1, 4, 2, "padded"), "HEAD_DIM_LAYOUT 'padded' cannot be combined with head_dim 128"),
        (ForwardConfig(64, 64, 1, 4, 2, "thirds"), "HEAD_DIM_LAYOUT is thirds"),
        (ForwardConfig(64, 64, 1, 4, 2, "split"), "HEAD_DIM_LAYOUT 'split' cannot be combined with head_dim 128"),
        (ForwardConfig(64, 64, 1, 4, 2, maxnreg=100), "maxnreg is 100"),
        (ForwardConfig(128, 64, 1, 8, 2, maxnreg=168), "maxnreg 168 lets no more programs of 8 warps run together"),
        (ForwardConfig(64, 64, 1, 4, 2, maxnreg=168), "its accumulators need 192 registers per thread; maxnreg is 168"),
        (DecodeConfig(32, 8, 1, "none", 1, 4), "does not configure"),
        (DqDrConfig(64, 64, 1, 4, 2), "does not configure"),
    ],
)
def test_reasons_against_forward_configs(config: KernelConfig, reason: str) -> None:
    assert reason in str(why_invalid(KernelSpec("forward", 128, "bf16"), config, H200))


def test_two_warps_share_rows_of_wide_heads() -> None:
    tile = ForwardConfig(32, 32, 1, 4, 2)
    assert why_invalid(KernelSpec("forward", 128, "bf16"), tile, H200) is None
    assert "too small" in str(why_invalid(KernelSpec("forward", 64, "bf16"), tile, H200))
    assert "too small" in str(
        why_invalid(KernelSpec("forward", 96, "bf16"), replace(tile, HEAD_DIM_LAYOUT="chunked"), H200)
    )
    assert why_invalid(KernelSpec("forward", 96, "bf16"), replace(tile, HEAD_DIM_LAYOUT="padded"), H200) is None


@pytest.mark.parametrize(
    ("op", "config", "reason"),
    [
        # Two accumulators of the program's keys or rows, and two score tiles: 2 * 128 * (128 + 64) / (32 * 4) = 384
        ("dkdv", DkDvConfig(64, 128, 1, 4, 2), "need 384 registers per thread"),
        ("dqdr", DqDrConfig(128, 64, 1, 4, 2), "need 384 registers per thread"),
        ("dkdv", DkDvConfig(128, 64, 1, 8, 4), "shared memory"),
        ("dkdv", DkDvConfig(32, 64, 1, 4, 2, QR_TILE="stacked"), None),
        ("dkdv", DkDvConfig(64, 32, 1, 4, 2, QR_TILE="stacked"), "QR_TILE 'stacked' needs tensor cores and 16 rows"),
        ("dqdr", DqDrConfig(32, 64, 1, 4, 2, QR_TILE="stacked"), "QR_TILE 'stacked' needs tensor cores and 16 rows"),
        ("dqdr", DqDrConfig(128, 64, 1, 8, 4), None),
        ("dqdr", DqDrConfig(128, 64, 1, 8, 3, LOADS="descriptors"), None),
        ("dqdr", DqDrConfig(128, 64, 1, 8, 3, LOADS="blocks"), "LOADS is blocks"),
        ("dqdr", ForwardConfig(64, 64, 1, 4, 2), "a ForwardConfig does not configure a dqdr kernel"),
        ("dkdv", DqDrConfig(64, 64, 1, 4, 2), "a DqDrConfig does not configure a dkdv kernel"),
        ("preprocess", PreprocessConfig(64, 2), "its rows need 384 registers per thread"),
        ("preprocess", PreprocessConfig(64, 3), "num_warps is 3"),
        ("preprocess", PreprocessConfig(64, 4), None),
    ],
)
def test_reasons_against_backward_configs(op: str, config: KernelConfig, reason: str | None) -> None:
    found = why_invalid(KernelSpec(op, 128, "bf16"), config, H200)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("spec", "gpu", "reason"),
    [
        (KernelSpec("forward", 128, "fp16", causal=True), "h100", None),
        (KernelSpec("forward", 128, "bf16"), "b200", None),
        (KernelSpec("forward", 128, "bf16"), "a100", "needs a GPU of capability 9.0 or later; a100 has 8.0"),
        (KernelSpec("forward", 128, "bf16", varlen=True), "h200", "cannot be combined with packed sequences"),
        (KernelSpec("forward", 128, "tf32"), "h200", "needs bf16 or fp16, not tf32"),
    ],
)
def test_where_descriptors_are_possible(spec: KernelSpec, gpu: str, reason: str | None) -> None:
    found = why_invalid(spec, ForwardConfig(64, 32, 1, 4, 1, LOADS="descriptors"), GPUS[gpu])
    assert found is None if reason is None else reason in str(found)
    loads = next(knob for knob in knobs_of(spec) if knob.name == "LOADS")
    assert (loads.values == ("pointers",)) == (spec.varlen or spec.dtype == "tf32")


def test_the_padding_of_a_head_counts() -> None:
    """Found by compiling: counted as 112 wide, this was valid on an RTX 4090, which has no room for 128."""
    config = DqDrConfig(64, 16, 1, 4, 1, "padded")
    for head_dim in (112, 120, 128):
        form = "native" if head_dim == 128 else "padded"
        spec, of_it = KernelSpec("dqdr", head_dim, "tf32"), replace(config, HEAD_DIM_LAYOUT=form)
        assert shared_bytes(spec, of_it, H200) == (3 * 64 + 2 * 16) * 128 * 4
        assert shared_bytes(spec, of_it, GPUS["rtx4090"]) == (3 * 64 + 2 * 16) * 128 * 4 + 64 * 16 * 4 // 2
        assert "shared memory" in str(why_invalid(spec, of_it, GPUS["rtx4090"]))
    assert (
        shared_bytes(KernelSpec("dqdr", 104, "tf32"), replace(config, HEAD_DIM_LAYOUT="chunked"), H200) == 224 * 112 * 4
    )
    assert shared_bytes(KernelSpec("dqdr", 8, "tf32"), config, H200) == 224 * 16 * 4
    # 3 * 128 * 256 / (32 * 8) registers, not 3 * 128 * 136 / (32 * 8) = 204
    assert "need 384 registers" in str(
        why_invalid(KernelSpec("preprocess", 136, "bf16"), PreprocessConfig(128, 8), H200)
    )


def test_scores_exchanged_through_shared_memory_count() -> None:
    """Found by compiling: 172032 bytes on an A100, which has 166912. On Hopper scores stay in registers."""
    spec, config = KernelSpec("dqdr", 128, "bf16", causal=True), DqDrConfig(128, 64, 4, 8, 3)
    assert shared_bytes(spec, config, GPUS["a100"]) == 172032
    assert "shared memory" in str(why_invalid(spec, config, GPUS["a100"]))
    assert shared_bytes(spec, config, H200) == 163840
    assert why_invalid(spec, config, H200) is None


@pytest.mark.parametrize("head_dim", range(8, LARGEST_HEAD_DIM + 1, 8))
def test_shared_memory_counts_tiles_as_rendered(head_dim: int) -> None:
    for form in head_dim_layouts(head_dim):
        for op, owned, block in (("forward", 2 * 64, 32), ("dqdr", 3 * 64, 2 * 32), ("dkdv", 2 * 32, 3 * 64)):
            spec, config = KernelSpec(op, head_dim, "fp16"), OPS_BY_NAME[op].config(64, 32, 1, 4, 3, form)
            scored, summed = (
                sum(chunk.width for chunk in part) for part in OPS_BY_NAME[op].score_and_output_chunks(head_dim, form)
            )
            in_a_block = block * scored + (
                32 * summed if op == "forward" else 0
            )  # the block's values are summed separately
            assert OPS_BY_NAME[op].block_bytes(spec, config) == in_a_block * 2
            assert shared_bytes(spec, config, H200) == (owned * scored + 2 * in_a_block) * 2


@pytest.mark.parametrize(
    ("gpu", "spec", "needs"),
    [
        # Bytes of former defaults, which the predicate alone had accepted, compiled with Triton 3.6.
        ("h200", KernelSpec("dqdr", 88, "tf32"), {DqDrConfig(128, 64, 0, 8, 3, "chunked"): 270336}),
        ("h200", KernelSpec("dkdv", 88, "tf32"), {DkDvConfig(64, 128, 0, 8, 3, "chunked"): 247808}),
        ("h200", KernelSpec("forward", 96, "tf32"), {ForwardConfig(128, 64, 0, 8, 3, "chunked"): 245760}),
        ("h200", KernelSpec("forward", 128, "tf32"), {ForwardConfig(64, 64, 0, 4, 3): 262144}),
        ("h200", KernelSpec("dqdr", 192, "tf32"), {DqDrConfig(64, 32, 0, 4, 2, "chunked"): 245760}),
        ("h200", KernelSpec("dkdv", 192, "tf32"), {DkDvConfig(32, 64, 0, 4, 2, "chunked"): 246272}),
        ("b200", KernelSpec("forward", 128, "tf32"), {ForwardConfig(64, 64, 0, 4, 3): 262208}),
        ("b200", KernelSpec("dqdr", 192, "tf32"), {DqDrConfig(64, 32, 0, 4, 2, "chunked"): 245864}),
        ("h200", KernelSpec("dqdr", 256, "bf16"), {DqDrConfig(64, 64, 0, 8, 2): 233472}),
        ("b200", KernelSpec("dqdr", 256, "bf16"), {DqDrConfig(64, 64, 0, 8, 2): 262224}),
        ("b200", KernelSpec("dqdr", 128, "tf32"), {DqDrConfig(64, 64, 0, 4, 2): 262200}),
        ("b200", KernelSpec("dkdv", 128, "tf32"), {DkDvConfig(32, 64, 0, 4, 2): 246328}),
        ("b200", KernelSpec("dkdv", 64, "tf32"), {DkDvConfig(64, 128, 0, 8, 2): 246840}),
        ("a100", KernelSpec("forward", 64, "tf32"), {ForwardConfig(128, 64, 0, 8, 3): 172032}),
        ("a100", KernelSpec("forward", 104, "tf32"), {ForwardConfig(64, 64, 0, 4, 3, "chunked"): 172032}),
        ("rtx4090", KernelSpec("forward", 64, "tf32"), {ForwardConfig(64, 64, 0, 4, 3): 118784}),
        ("rtx4090", KernelSpec("forward", 128, "tf32"), {ForwardConfig(64, 32, 0, 4, 2): 115200}),
        ("rtx4090", KernelSpec("forward", 128, "bf16"), {ForwardConfig(64, 64, 0, 4, 3): 114688}),
        ("rtx4090", KernelSpec("forward", 192, "tf32"), {ForwardConfig(32, 32, 0, 4, 2, "chunked"): 107008}),
        ("rtx4090", KernelSpec("dkdv", 152, "bf16"), {DkDvConfig(64, 64, 0, 4, 2, "chunked"): 107520}),
    ],
)
def test_defaults_are_not_the_former_ones_that_did_not_fit(
    gpu: str, spec: KernelSpec, needs: dict[KernelConfig, int]
) -> None:
    """A call without records launches its default, and there is no fallback."""
    for rows, seqlen in ((64, 4096), (1, 64), (8, 4096), (1, 8192)):
        found = default_config(spec, representative(Bucket(rows, seqlen, seqlen), spec.group), GPUS[gpu])
        assert needs.get(replace(found, GROUP_HEADS=0), 0) <= GPUS[gpu].shared_per_block  # type: ignore[call-arg]
        assert shared_bytes(spec, found, GPUS[gpu]) + KIB <= GPUS[gpu].shared_per_block


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DecodeConfig(32, 8, 1, "last", 1, 4), "cannot be combined with"),
        (DecodeConfig(32, 8, 4, "none", 1, 4), "cannot be combined with"),
        (DecodeConfig(16, 8, 4, "last", 4, 4), "fewer than 8 of the block's"),
        (DecodeConfig(32, 16, 4, "last", 1, 4), "half empty"),
        (DecodeConfig(128, 8, 4, "last", 4, 6), "shared memory"),
    ],
)
def test_reasons_against_decode_configs(config: DecodeConfig, reason: str) -> None:
    assert reason in str(why_invalid(KernelSpec("decode", 128, "bf16"), config, H200))


DECODE_VARLEN = KernelSpec("decode_varlen", 128, "bf16")


@pytest.mark.parametrize(
    ("spec", "config", "reason"),
    [
        (DECODE_VARLEN, DecodeConfig(32, 8, 1, "last", 1, 4), None),
        (DECODE_VARLEN, DecodeConfig(32, 8, 4, "last", 1, 4), None),
        (
            DECODE_VARLEN,
            DecodeConfig(32, 8, 1, "none", 1, 4),
            "merge 'none' cannot be combined with per-sequence lengths",
        ),
        (DECODE_VARLEN, DecodeConfig(32, 8, 4, "kernel", 1, 4), None),
        (
            replace(DECODE_VARLEN, multi_token=True),
            DecodeConfig(32, 8, 4, "kernel", 1, 4),
            "merge 'kernel' cannot be combined with multi-token queries",
        ),
        (DECODE_VARLEN, DecodeConfig(64, 16, 4, "last", 4, 2), "half empty"),  # one head a kv head
        (replace(DECODE_VARLEN, multi_token=True), DecodeConfig(64, 16, 4, "last", 4, 2), None),  # with 16 queries
        (replace(DECODE_VARLEN, multi_token=True), DecodeConfig(64, 64, 4, "last", 4, 2), None),
        (
            replace(DECODE_VARLEN, multi_token=True),
            DecodeConfig(64, 64, 4, "last", 2, 2),
            "need 384 registers per thread",
        ),
        (
            replace(DECODE_VARLEN, dtype="fp32"),
            DecodeConfig(64, 8, 4, "last", 2, 2),
            "heads at head_dim 128 does not fit in the registers",
        ),
        (replace(DECODE_VARLEN, dtype="tf32"), DecodeConfig(64, 8, 4, "last", 2, 2), None),
        # 5 blocks of keys and values: 2 * 128 * 128 elements each, of two bytes or one. Queries, weights and sums: 8256
        (DECODE_VARLEN, DecodeConfig(128, 8, 4, "last", 2, 6), "need 335936 bytes of shared memory"),
        (replace(DECODE_VARLEN, cache_dtype="e4m3"), DecodeConfig(128, 8, 4, "last", 2, 6), None),
    ],
)
def test_reasons_against_decode_varlen_configs(spec: KernelSpec, config: DecodeConfig, reason: str | None) -> None:
    found = why_invalid(spec, config, H200)
    assert found is None if reason is None else reason in str(found)


def test_decode_varlen_splits_are_always_merged() -> None:
    """One split a sequence on average means several for a long sequence."""
    many = replace(DECODE_VARLEN, multi_token=True)
    for spec, merges in ((DECODE_VARLEN, ("last", "kernel")), (many, ("last",))):
        assert [knob.values for knob in knobs_of(spec) if knob.name == "merge"] == [merges]
        first = {knob.name: knob.values[0] for knob in OPS_BY_NAME["decode"].knobs}
        for splits in (1, 4):
            for merge in ("none", "last", "kernel"):
                config = coerce(spec, {**first, "NUM_SPLITS": splits, "merge": merge})
                assert config == DecodeConfig(16, 8, splits, merge if merge in merges else "last", 1, 2)
                assert why_invalid(spec, config, H200) is None


def test_multi_token_queries_fill_tiles_that_a_group_of_heads_does_not() -> None:
    of_one, of_many = (
        next(knob.values for knob in knobs_of(spec) if knob.name == "BLOCK_H")
        for spec in (DECODE_VARLEN, replace(DECODE_VARLEN, multi_token=True))
    )
    assert (of_one, of_many) == ((8,), (8, 16, 32, 64))


def test_shared_memory_is_limited_by_the_gpu() -> None:
    spec, config = KernelSpec("forward", 128, "bf16"), ForwardConfig(128, 64, 1, 8, 3)
    assert why_invalid(spec, config, H200) is None
    assert "shared memory" in str(why_invalid(spec, config, GPUS["rtx4090"]))


def test_one_split_needs_no_merge() -> None:
    spec = KernelSpec("decode", 128, "bf16")
    first = {knob.name: knob.values[0] for knob in OPS_BY_NAME["decode"].knobs}
    assert coerce(spec, {**first, "NUM_SPLITS": 1, "merge": "kernel"}) == coerce(spec, {**first, "merge": "none"})
    assert coerce(spec, {**first, "NUM_SPLITS": 4, "merge": "none"}).merge == "last"  # type: ignore[union-attr]
