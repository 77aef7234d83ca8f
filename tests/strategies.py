"""Kernels to test, named ones and hypothesis strategies that draw any valid one; and inputs laid out in many ways."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from parallax_gen.codegen.calling import Inputs
from parallax_gen.problem.config import DecodeConfig, ForwardConfig, KernelConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.space import coerce, knobs_of, why_invalid
from parallax_gen.problem.spec import DTYPES, HEAD_DIMS, OPS, KernelSpec

GROUPS = (1, 2, 3, 4, 7, 8, 12, 16)
LONGEST = 200


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


# Rendered in tests/golden, for people to read and to see in a diff what a template's change does. Between them they
# show most of what the templates decide.
GOLDEN = {
    "forward_causal_stats": Kernel(
        KernelSpec("forward", 128, "bf16", causal=True, stats=True),
        ForwardConfig(BLOCK_M=128, BLOCK_N=64, HEAD_GROUP=1, num_warps=8, num_stages=3),
    ),
    "forward_full_gqa": Kernel(
        KernelSpec("forward", 64, "fp16", group=4),
        ForwardConfig(BLOCK_M=64, BLOCK_N=64, HEAD_GROUP=8, num_warps=4, num_stages=3),
    ),
    "decode_unsplit": Kernel(
        KernelSpec("decode", 128, "bf16"),
        DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=1, merge="none", num_warps=2, num_stages=4),
    ),
    "decode_merge_last_gqa_ragged": Kernel(
        KernelSpec("decode", 128, "bf16", group=12, ragged=True),
        DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=6, merge="last", num_warps=2, num_stages=4),
    ),
    "decode_merge_kernel": Kernel(
        KernelSpec("decode", 64, "fp16", group=16),
        DecodeConfig(BLOCK_N=64, BLOCK_H=16, NUM_SPLITS=8, merge="kernel", num_warps=4, num_stages=3),
    ),
    "decode_merge_chunked": Kernel(
        KernelSpec("decode", 128, "fp32"),
        DecodeConfig(BLOCK_N=16, BLOCK_H=8, NUM_SPLITS=24, merge="last", num_warps=1, num_stages=3),
    ),
}


def random_kernels(count: int, gpu: Gpu) -> list[Kernel]:
    """Different kernels that can be tried on `gpu`, the same ones in every run."""
    draw = random.Random(0)
    found: dict[Kernel, None] = {}
    while len(found) < count:
        op = draw.choice(OPS)
        flags = {flag: draw.random() < 0.5 for flag in (("causal", "stats") if op == "forward" else ("ragged",))}
        spec = KernelSpec(op, draw.choice(HEAD_DIMS), draw.choice(DTYPES), draw.choice(GROUPS), **flags)
        config = coerce(spec, {knob.name: draw.choice(knob.values) for knob in knobs_of(spec)})
        if why_invalid(spec, config, gpu) is None:
            found[Kernel(spec, config)] = None
    return list(found)


def specs(op: str, dtypes: Sequence[str]) -> st.SearchStrategy[KernelSpec]:
    flags = ("causal", "stats") if op == "forward" else ("ragged",)
    return st.builds(
        KernelSpec,
        op=st.just(op),
        head_dim=st.sampled_from((64, 128)),
        dtype=st.sampled_from(dtypes),
        group=st.sampled_from(GROUPS),
        **{flag: st.booleans() for flag in flags},
    )


def configs(spec: KernelSpec, gpu: Gpu) -> st.SearchStrategy[KernelConfig]:
    """Any config that can be tried for `spec` on `gpu`."""
    knobs = {knob.name: st.sampled_from(knob.values) for knob in knobs_of(spec)}
    drawn = st.fixed_dictionaries(knobs).map(lambda choices: coerce(spec, choices))
    return drawn.filter(lambda config: why_invalid(spec, config, gpu) is None)


@st.composite
def shapes(draw: st.DrawFn, spec: KernelSpec, config: KernelConfig, most_programs: int) -> Shape:
    """Up to LONGEST queries and keys, either of them the more, often next to a block's edge.

    A launch that can have at most most_programs programs does: the interpreter runs them one after another.
    """
    a_pair = spec.group  # programs a (sequence, kv head), at the least
    if isinstance(config, DecodeConfig):
        a_pair = -(-spec.group // config.BLOCK_H) * config.NUM_SPLITS
    pairs = max(1, most_programs // a_pair)
    batch = draw(st.integers(1, min(2, pairs)))
    kv_heads = draw(st.integers(1, min(2, pairs // batch)))
    seqlen_q = 1
    if isinstance(config, ForwardConfig):
        tiles = max(1, most_programs // (a_pair * batch * kv_heads))
        seqlen_q = draw(_lengths(config.BLOCK_M, min(LONGEST, tiles * config.BLOCK_M)))
    seqlen_kv = draw(_lengths(config.BLOCK_N, LONGEST))
    return Shape(batch, kv_heads * spec.group, kv_heads, seqlen_q, seqlen_kv)


def _lengths(block: int, longest: int) -> st.SearchStrategy[int]:
    edges = [n for edge in range(block, longest + 1, block) for n in (edge - 1, edge, edge + 1) if n <= longest]
    anywhere = st.integers(1, longest)
    return anywhere | st.sampled_from(edges) if edges else anywhere


@st.composite
def cases(draw: st.DrawFn, op: str, dtypes: Sequence[str], gpu: Gpu, most_programs: int) -> Case:
    """Any kernel of an op that can be tried on `gpu`, with a shape and a seed."""
    spec = draw(specs(op, dtypes))
    config = draw(configs(spec, gpu))
    return Case(spec, config, draw(shapes(spec, config, most_programs)), draw(st.integers(0, 2**16)))


def fused(inputs: Inputs) -> Inputs:
    """q, r, k and v as one projection leaves them, side by side; k and v apart where their lengths differ."""
    if inputs.q.shape[:2] == inputs.k.shape[:2]:
        q, r, k, v = _side_by_side(inputs.q, inputs.r, inputs.k, inputs.v)
    else:
        (q, r), (k, v) = _side_by_side(inputs.q, inputs.r), _side_by_side(inputs.k, inputs.v)
    return Inputs(q, r, k, v, inputs.cache_seqlens)


def heads_first(inputs: Inputs) -> Inputs:
    """Everything as (batch, heads, seqlen, head_dim) in memory."""
    return _each(inputs, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))


def in_larger_tensors(inputs: Inputs) -> Inputs:
    """Everything as the beginning of tensors with more sequences, positions, heads and dimensions: all NaN there."""

    def embedded(x: Tensor) -> Tensor:
        around = x.new_full([size + more for size, more in zip(x.shape, (1, 9, 2, 16), strict=True)], float("nan"))
        view = around[: x.shape[0], : x.shape[1], : x.shape[2], : x.shape[3]]
        return view.copy_(x)

    return _each(inputs, embedded)


def one_cache_for_all(inputs: Inputs) -> Inputs:
    """One sequence's keys and values for the whole batch, its stride 0: a prompt that many continue."""
    k, v = (x[:1].expand_as(x) for x in (inputs.k, inputs.v))
    lengths = inputs.cache_seqlens
    return replace(inputs, k=k, v=v, cache_seqlens=None if lengths is None else lengths[:1].repeat(len(lengths)))


def unaligned(inputs: Inputs) -> Inputs:
    """Everything one element behind where a row of 16 bytes begins, and rows an odd number of elements apart."""

    def moved(x: Tensor) -> Tensor:
        around = x.new_full((*x.shape[:3], x.shape[3] + 1), float("nan"))
        return around[..., 1:].copy_(x)

    return _each(inputs, moved)


LAYOUTS = (fused, heads_first, in_larger_tensors, one_cache_for_all, unaligned)


def far_apart(x: Tensor, y: Tensor, dim: int, stride: int) -> tuple[Tensor, Tensor]:
    """x and y, side by side in one tensor whose dimension `dim` has the stride `stride`, in elements."""
    both = torch.cat([x, y], dim=2)
    strides = list(both.stride())
    strides[dim] = stride
    reach = 1 + sum((size - 1) * step for size, step in zip(both.shape, strides, strict=True))
    assert reach > 1 << 31, "every offset fits 32 bits"
    far = both.new_empty(reach).as_strided(both.shape, strides).copy_(both)
    return far[:, :, : x.shape[2]], far[:, :, x.shape[2] :]


def _each(inputs: Inputs, layout: Callable[[Tensor], Tensor]) -> Inputs:
    q, r, k, v = (layout(x) for x in (inputs.q, inputs.r, inputs.k, inputs.v))
    return Inputs(q, r, k, v, inputs.cache_seqlens)


def _side_by_side(*tensors: Tensor) -> Sequence[Tensor]:
    return torch.cat(tensors, dim=2).split([x.shape[2] for x in tensors], dim=2)
