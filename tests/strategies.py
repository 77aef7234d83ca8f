"""Kernels to test: the golden ones, and hypothesis strategies for any valid one. Input layouts to test them with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from parallax_gen.codegen.abi import Inputs
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.ops.dqdr import DqDrConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.preprocess import PreprocessConfig
from parallax_gen.ops.space import coerce, knobs_of, why_invalid
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import CACHE_DTYPES, DTYPES, FLAGS, OPS, KernelSpec

GROUPS = (1, 2, 3, 4, 7, 8, 12, 16)
HEAD_DIMS = (8, 16, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256)
WINDOWS = (1, 97, 200, 256, 257, 513)
LONGEST = 200


def examples(count: int) -> settings:
    """Settings for slow tests (a second an example): `count` examples, 16 times as many with profile `explore`."""
    return settings(max_examples=count * settings.default.max_examples // 60)


@dataclass(frozen=True)
class Kernel:
    """What a kernel is rendered from, besides the GPU."""

    spec: KernelSpec
    config: KernelConfig


@dataclass(frozen=True)
class Case:
    """A kernel, the shape to run it at and the seed of the inputs."""

    spec: KernelSpec
    config: KernelConfig
    shape: Shape
    seed: int


@dataclass(frozen=True)
class StepCase:
    """A training step: the forward's spec, a config for each kernel by op, a shape and the inputs' seed."""

    spec: KernelSpec
    configs: dict[str, KernelConfig]
    shape: Shape
    seed: int


STEP = ("forward", "preprocess", "dkdv", "dqdr")


def step_case(seed: int, dtypes: Sequence[str], gpu: Gpu, longest: int) -> StepCase:
    """A random training step: any spec and configs, lengths up to `longest`, seldom multiples of a tile."""
    draw = random.Random(seed)
    spec = replace(random_spec(draw, "forward", dtypes), stats=True, group=draw.choice((1, 1, 2, 3, 4)))
    configs: dict[str, KernelConfig] = {}
    for op in STEP:
        of = spec.for_op(op)
        while op not in configs:
            config = coerce(of, {knob.name: draw.choice(knob.values) for knob in knobs_of(of)})
            if why_invalid(of, config, gpu) is None:
                configs[op] = config
    kv_heads = draw.choice((1, 2))
    lengths = [draw.choice((draw.randint(1, longest), 64, 127, 129)) for _ in range(2)]
    if draw.random() < 0.5:
        lengths[1] = lengths[0]
    windows = [window for window in WINDOWS if window <= longest]
    window = draw.choice((*windows, longest + 1, draw.randint(1, longest))) if spec.window else 0
    batch = draw.choice((1, 2, 3)) + spec.varlen  # a single packed sequence would have no queries or no keys
    shape = Shape(batch, kv_heads * spec.group, kv_heads, *lengths, window)
    return StepCase(spec, configs, shape, seed)


# Rendered in tests/golden, so that a diff shows what a change of a template does. Together they cover most of the
# templates' branches.
GOLDEN = {
    "forward_causal_stats": Kernel(
        KernelSpec("forward", 128, "bf16", causal=True, stats=True),
        ForwardConfig(BLOCK_M=128, BLOCK_N=64, GROUP_HEADS=1, num_warps=8, num_stages=3),
    ),
    "forward_full_gqa": Kernel(
        KernelSpec("forward", 64, "fp16", group=4),
        ForwardConfig(BLOCK_M=64, BLOCK_N=64, GROUP_HEADS=8, num_warps=4, num_stages=3),
    ),
    "forward_window_varlen_chunked": Kernel(
        KernelSpec("forward", 96, "bf16", group=2, causal=True, window=True, varlen=True),
        ForwardConfig(128, 64, GROUP_HEADS=8, num_warps=8, num_stages=3, HEAD_DIM_LAYOUT="chunked"),
    ),
    "forward_fixed_reference_narrow": Kernel(
        KernelSpec("forward", 64, "bf16", causal=True, stats=True),
        ForwardConfig(64, 64, GROUP_HEADS=32, num_warps=4, num_stages=3, maxnreg=168, SOFTMAX="fixed_reference"),
    ),
    "forward_fixed_reference_window_varlen": Kernel(
        KernelSpec("forward", 128, "bf16", group=2, causal=True, window=True, varlen=True),
        ForwardConfig(128, 64, GROUP_HEADS=1, num_warps=8, num_stages=3, SOFTMAX="fixed_reference"),
    ),
    "preprocess": Kernel(KernelSpec("preprocess", 128, "bf16"), PreprocessConfig(BLOCK_M=32, num_warps=4)),
    "dkdv_causal": Kernel(
        KernelSpec("dkdv", 128, "bf16", causal=True),
        DkDvConfig(BLOCK_M=64, BLOCK_N=128, GROUP_HEADS=4, num_warps=8, num_stages=3),
    ),
    "dkdv_window_varlen_gqa_padded": Kernel(
        KernelSpec("dkdv", 80, "fp16", group=4, causal=True, window=True, varlen=True),
        DkDvConfig(BLOCK_M=64, BLOCK_N=128, GROUP_HEADS=1, num_warps=8, num_stages=2, HEAD_DIM_LAYOUT="padded"),
    ),
    "dqdr_causal": Kernel(
        KernelSpec("dqdr", 128, "bf16", causal=True),
        DqDrConfig(BLOCK_M=128, BLOCK_N=64, GROUP_HEADS=4, num_warps=8, num_stages=3),
    ),
    "dqdr_full_tf32": Kernel(
        KernelSpec("dqdr", 64, "tf32", group=2),
        DqDrConfig(BLOCK_M=64, BLOCK_N=32, GROUP_HEADS=0, num_warps=4, num_stages=2),
    ),
    "forward_split_head_dim": Kernel(
        KernelSpec("forward", 256, "bf16", group=2, causal=True, stats=True),
        ForwardConfig(128, 64, GROUP_HEADS=4, num_warps=8, num_stages=2, HEAD_DIM_LAYOUT="split"),
    ),
    "dkdv_fused_row_stats": Kernel(
        KernelSpec("dkdv", 64, "bf16", causal=True),
        DkDvConfig(64, 64, GROUP_HEADS=16, num_warps=4, num_stages=3, MASK="before_exp", ROW_STATS="fused"),
    ),
    "dqdr_mask_before_exp": Kernel(
        KernelSpec("dqdr", 64, "bf16", causal=True),
        DqDrConfig(64, 64, GROUP_HEADS=32, num_warps=4, num_stages=3, MASK="before_exp"),
    ),
    "dkdv_narrow_maxnreg": Kernel(
        KernelSpec("dkdv", 64, "bf16", causal=True),
        DkDvConfig(32, 64, GROUP_HEADS=32, num_warps=4, num_stages=3, maxnreg=168),
    ),
    "dqdr_split_head_dim_varlen": Kernel(
        KernelSpec("dqdr", 256, "fp16", group=2, varlen=True),
        DqDrConfig(64, 32, GROUP_HEADS=1, num_warps=4, num_stages=2, HEAD_DIM_LAYOUT="split"),
    ),
    "decode_unsplit": Kernel(
        KernelSpec("decode", 128, "bf16"),
        DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=1, merge="none", num_warps=2, num_stages=4),
    ),
    "decode_varlen_merge_last_gqa": Kernel(
        KernelSpec("decode_varlen", 128, "bf16", group=12),
        DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=6, merge="last", num_warps=2, num_stages=4),
    ),
    "decode_varlen_paged": Kernel(
        KernelSpec("decode_varlen", 128, "bf16", group=4, page_size=64),
        DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=1, merge="last", num_warps=2, num_stages=4),
    ),
    "decode_varlen_small_pages": Kernel(
        KernelSpec("decode_varlen", 128, "bf16", group=4, page_size=16),
        DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=4, merge="last", num_warps=2, num_stages=4),
    ),
    "decode_varlen_small_pages_leftpad": Kernel(
        KernelSpec("decode_varlen", 128, "bf16", group=4, leftpad=True, page_size=16),
        DecodeConfig(BLOCK_N=64, BLOCK_H=8, NUM_SPLITS=4, merge="last", num_warps=2, num_stages=3),
    ),
    "decode_varlen_merge_kernel": Kernel(
        KernelSpec("decode_varlen", 128, "bf16", group=12, stats=True),
        DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=16, merge="kernel", num_warps=2, num_stages=4),
    ),
    "decode_merge_kernel": Kernel(
        KernelSpec("decode", 64, "fp16", group=16),
        DecodeConfig(BLOCK_N=64, BLOCK_H=16, NUM_SPLITS=8, merge="kernel", num_warps=4, num_stages=3),
    ),
    "decode_varlen_packed_queries_window_leftpad_stats": Kernel(
        KernelSpec(
            "decode_varlen",
            96,
            "bf16",
            group=4,
            causal=True,
            stats=True,
            window=True,
            varlen=True,
            leftpad=True,
            multi_token=True,
        ),
        DecodeConfig(BLOCK_N=64, BLOCK_H=32, NUM_SPLITS=3, merge="last", num_warps=4, num_stages=2),
    ),
    "decode_varlen_paged_e4m3": Kernel(
        KernelSpec("decode_varlen", 128, "bf16", group=8, page_size=64, cache_dtype="e4m3"),
        DecodeConfig(BLOCK_N=64, BLOCK_H=8, NUM_SPLITS=4, merge="last", num_warps=2, num_stages=4),
    ),
    "decode_varlen_multi_token_queries_causal_paged": Kernel(
        KernelSpec("decode_varlen", 128, "fp16", group=2, causal=True, multi_token=True, page_size=16, stats=True),
        DecodeConfig(BLOCK_N=32, BLOCK_H=16, NUM_SPLITS=8, merge="last", num_warps=4, num_stages=3),
    ),
    "decode_merge_chunked": Kernel(
        KernelSpec("decode", 128, "fp32"),
        DecodeConfig(BLOCK_N=16, BLOCK_H=8, NUM_SPLITS=24, merge="last", num_warps=1, num_stages=3),
    ),
    "forward_softcap": Kernel(
        KernelSpec("forward", 128, "bf16", causal=True, stats=True, softcap=True),
        ForwardConfig(BLOCK_M=128, BLOCK_N=64, GROUP_HEADS=1, num_warps=8, num_stages=3),
    ),
    "dkdv_softcap": Kernel(
        KernelSpec("dkdv", 128, "bf16", causal=True, softcap=True),
        DkDvConfig(BLOCK_M=64, BLOCK_N=128, GROUP_HEADS=4, num_warps=8, num_stages=3),
    ),
    "decode_softcap": Kernel(
        KernelSpec("decode", 128, "bf16", softcap=True),
        DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=1, merge="none", num_warps=2, num_stages=4),
    ),
    "forward_fixed_reference_varlen": Kernel(
        KernelSpec("forward", 128, "bf16", causal=True, varlen=True),
        ForwardConfig(128, 64, GROUP_HEADS=4, num_warps=8, num_stages=3, SOFTMAX="fixed_reference"),
    ),
    "dkdv_stacked": Kernel(
        KernelSpec("dkdv", 128, "bf16", causal=True),
        DkDvConfig(32, 64, GROUP_HEADS=4, num_warps=4, num_stages=3, QR_TILE="stacked"),
    ),
    "dqdr_stacked": Kernel(
        KernelSpec("dqdr", 128, "bf16", causal=True),
        DqDrConfig(128, 64, GROUP_HEADS=4, num_warps=8, num_stages=3, MASK="before_exp", QR_TILE="stacked"),
    ),
    "forward_descriptors": Kernel(
        KernelSpec("forward", 128, "bf16", causal=True, stats=True),
        ForwardConfig(64, 64, GROUP_HEADS=4, num_warps=4, num_stages=2, LOADS="descriptors", SOFTMAX="fixed_reference"),
    ),
    "dkdv_descriptors": Kernel(
        KernelSpec("dkdv", 128, "bf16", group=4, causal=True),
        DkDvConfig(32, 64, GROUP_HEADS=4, num_warps=4, num_stages=3, LOADS="descriptors", QR_TILE="stacked"),
    ),
    "dqdr_descriptors": Kernel(
        KernelSpec("dqdr", 96, "bf16"),
        DqDrConfig(64, 64, 4, num_warps=4, num_stages=3, HEAD_DIM_LAYOUT="chunked", LOADS="descriptors"),
    ),
    "decode_varlen_batch_invariant": Kernel(
        KernelSpec("decode_varlen", 128, "bf16", group=4, batch_invariant=True),
        DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=32, merge="kernel", num_warps=1, num_stages=4),
    ),
    "decode_varlen_batch_invariant_prompts": Kernel(
        KernelSpec(
            "decode_varlen",
            128,
            "bf16",
            group=4,
            causal=True,
            window=True,
            varlen=True,
            page_size=16,
            multi_token=True,
            batch_invariant=True,
        ),
        DecodeConfig(BLOCK_N=64, BLOCK_H=64, NUM_SPLITS=8, merge="last", num_warps=8, num_stages=3),
    ),
}


def random_kernels(count: int, gpu: Gpu) -> list[Kernel]:
    """Distinct valid kernels for `gpu`, the same ones in every run."""
    draw = random.Random(0)
    found: dict[Kernel, None] = {}
    while len(found) < count:
        spec = random_spec(draw, draw.choice(OPS), DTYPES)
        config = coerce(spec, {knob.name: draw.choice(knob.values) for knob in knobs_of(spec)})
        if why_invalid(spec, config, gpu) is None:
            found[Kernel(spec, config)] = None
    return list(found)


def random_spec(draw: random.Random, op: str, dtypes: Sequence[str]) -> KernelSpec:
    """A random spec of an op, in one of the dtypes that the op supports."""
    odds = dict.fromkeys(FLAGS, 0.5) | {"softcap": 0.25}
    del odds["batch_invariant"]  # only decode_varlen has other kernels for it
    flags = compatible_flags(op, {flag: draw.random() < odds[flag] for flag in odds if op in FLAGS[flag]})
    head_dim = draw.choice(HEAD_DIMS)
    dtype = draw.choice([d for d in dtypes if d != "tf32" or op != "preprocess"])
    group = 1 if op == "preprocess" else draw.choice(GROUPS)
    if op != "decode_varlen":
        return KernelSpec(op, head_dim, dtype, group, **flags)
    page_size = draw.choice((0, 1, 16, 48, 64))
    cache_dtype = draw.choice(CACHE_DTYPES) if dtype in ("bf16", "fp16") else ""
    flags["batch_invariant"] = draw.random() < 0.5
    return KernelSpec(op, head_dim, dtype, group, **flags, page_size=page_size, cache_dtype=cache_dtype)


def compatible_flags(op: str, flags: dict[str, bool]) -> dict[str, bool]:
    """Switch off flags that are incompatible with the others."""
    if "window" in flags:
        flags["window"] &= flags["causal"]
    if op == "decode_varlen":
        flags["varlen"] &= flags["multi_token"]
        flags["causal"] &= flags["multi_token"] or flags["window"]
    return flags


def specs(op: str, dtypes: Sequence[str]) -> st.SearchStrategy[KernelSpec]:
    """`random_spec` as a hypothesis strategy."""
    return st.randoms(use_true_random=False).map(lambda draw: random_spec(draw, op, dtypes))


def configs(spec: KernelSpec, gpu: Gpu) -> st.SearchStrategy[KernelConfig]:
    """Any valid config for `spec` on `gpu`."""
    knobs = {knob.name: st.sampled_from(knob.values) for knob in knobs_of(spec)}
    drawn = st.fixed_dictionaries(knobs).map(lambda choices: coerce(spec, choices))
    return drawn.filter(lambda config: why_invalid(spec, config, gpu) is None)


@st.composite
def shapes(draw: st.DrawFn, spec: KernelSpec, config: KernelConfig, most_programs: int) -> Shape:
    """Up to LONGEST queries and keys, often next to a block's edge. Either may be the longer.

    A launch has at most most_programs programs where possible: the interpreter runs them one after another.
    """
    programs_per_pair = 1 if isinstance(config, DkDvConfig) else spec.group  # least programs a (sequence, kv head)
    if isinstance(config, DecodeConfig):
        programs_per_pair = -(-spec.group // config.BLOCK_H) * (config.NUM_SPLITS + op_of(spec).per_sequence_lengths)
    pairs = max(1, most_programs // programs_per_pair)
    batch = draw(st.integers(1, min(3, pairs)))
    kv_heads = draw(st.integers(1, min(2, pairs // batch)))
    tiles = max(1, most_programs // (programs_per_pair * batch * kv_heads))
    if isinstance(config, DecodeConfig):
        most_q = min(LONGEST, tiles * config.BLOCK_H // spec.group) if spec.multi_token else 1
        seqlen_q = draw(st.integers(1, max(1, most_q)))
        window = draw(st.sampled_from(WINDOWS) | st.integers(1, LONGEST)) if spec.window else 0
        seqlen_kv = draw(_lengths(config.BLOCK_N, LONGEST))
        return Shape(batch, kv_heads * spec.group, kv_heads, seqlen_q, seqlen_kv, window)
    if isinstance(config, PreprocessConfig):
        seqlen = draw(_lengths(config.BLOCK_M, min(LONGEST, tiles * config.BLOCK_M)))
        return Shape(batch, kv_heads, kv_heads, seqlen, seqlen)
    most_q = LONGEST if isinstance(config, DkDvConfig) else min(LONGEST, tiles * config.BLOCK_M)
    most_k = min(LONGEST, tiles * config.BLOCK_N) if isinstance(config, DkDvConfig) else LONGEST
    seqlen_q = draw(_lengths(config.BLOCK_M, most_q))
    seqlen_kv = draw(_lengths(config.BLOCK_N, most_k))
    window = draw(st.sampled_from(WINDOWS) | st.integers(1, LONGEST)) if spec.window else 0
    return Shape(batch, kv_heads * spec.group, kv_heads, seqlen_q, seqlen_kv, window)


def _lengths(block: int, longest: int) -> st.SearchStrategy[int]:
    edges = [n for edge in range(block, longest + 1, block) for n in (edge - 1, edge, edge + 1) if n <= longest]
    anywhere = st.integers(1, longest)
    return anywhere | st.sampled_from(edges) if edges else anywhere


@st.composite
def cases(draw: st.DrawFn, op: str, dtypes: Sequence[str], gpu: Gpu, most_programs: int) -> Case:
    """Any valid kernel of an op on `gpu`, with a shape and a seed."""
    spec = draw(specs(op, dtypes))
    config = draw(configs(spec, gpu))
    return Case(spec, config, draw(shapes(spec, config, most_programs)), draw(st.integers(0, 2**16)))


def fused_projection(inputs: Inputs) -> Inputs:
    """q, r, k and v as slices of one fused projection; k and v of another one if their lengths differ."""
    if inputs.q.shape[:-2] == inputs.k.shape[:-2]:
        q, r, k, v = _side_by_side(inputs.q, inputs.r, inputs.k, inputs.v)
    else:
        (q, r), (k, v) = _side_by_side(inputs.q, inputs.r), _side_by_side(inputs.k, inputs.v)
    return replace(inputs, q=q, r=r, k=k, v=v)


def heads_first(inputs: Inputs) -> Inputs:
    """Every tensor laid out as (batch, heads, seqlen, head_dim) in memory."""
    return _each(inputs, lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2))


def padded_views(inputs: Inputs) -> Inputs:
    """Every tensor a slice of one that is larger in every dimension, and NaN outside the slice."""

    def embedded(x: Tensor) -> Tensor:
        more = (1, 9, 2, 16)[-x.dim() :]
        around = x.new_full([size + extra for size, extra in zip(x.shape, more, strict=True)], float("nan"))
        return around[tuple(slice(size) for size in x.shape)].copy_(x)

    return _each(inputs, embedded)


def broadcast_cache(inputs: Inputs) -> Inputs:
    """One sequence's keys and values broadcast over the batch (stride 0), as a shared prompt."""
    k, v = (x[:1].expand_as(x) for x in (inputs.k, inputs.v))
    lengths = inputs.cache_seqlens
    return replace(inputs, k=k, v=v, cache_seqlens=None if lengths is None else lengths[:1].repeat(len(lengths)))


def unaligned(inputs: Inputs) -> Inputs:
    """Every tensor begins one element past a 16-byte boundary, and its rows have an odd stride."""

    def moved(x: Tensor) -> Tensor:
        around = x.new_full((*x.shape[:-1], x.shape[-1] + 1), float("nan"))
        return around[..., 1:].copy_(x)

    return _each(inputs, moved)


LAYOUTS = (fused_projection, heads_first, padded_views, broadcast_cache, unaligned)
# Layouts that keep the values, so that results computed earlier still hold.
VALUE_PRESERVING_LAYOUTS = (fused_projection, heads_first, padded_views, unaligned)


def far_apart(x: Tensor, y: Tensor, dim: int, stride: int) -> tuple[Tensor, Tensor]:
    """x and y side by side in one tensor in which `dim` has this stride, in elements."""
    both = torch.cat([x, y], dim=2)
    strides = list(both.stride())
    strides[dim] = stride
    reach = 1 + sum((size - 1) * step for size, step in zip(both.shape, strides, strict=True))
    assert reach > 1 << 31, "every offset fits 32 bits"
    far = both.new_empty(reach).as_strided(both.shape, strides).copy_(both)
    return far[:, :, : x.shape[2]], far[:, :, x.shape[2] :]


def _each(inputs: Inputs, layout: Callable[[Tensor], Tensor]) -> Inputs:
    q, r, k, v = (layout(x) for x in (inputs.q, inputs.r, inputs.k, inputs.v))
    others = {name: getattr(inputs, name) for name in ("do", "out", "v_mean")}
    there = {name: layout(x) for name, x in others.items() if x is not None}
    return replace(inputs, q=q, r=r, k=k, v=v, **there)


def _side_by_side(*tensors: Tensor) -> Sequence[Tensor]:
    return torch.cat(tensors, dim=-2).split([x.shape[-2] for x in tensors], dim=-2)
