"""The config to use where nothing was measured: the tuner's first trial and the dispatcher's last resort."""

from __future__ import annotations

from dataclasses import fields, replace

from parallax_gen.errors import ConfigError
from parallax_gen.ops.base import (
    TILED,
    DecodeConfig,
    DkDvConfig,
    DqDrConfig,
    ForwardConfig,
    KernelConfig,
    PreprocessConfig,
    TileConfig,
)
from parallax_gen.ops.space import KNOBS, block_bytes, forms_of, shared_bytes, why_invalid
from parallax_gen.problem.hardware import KIB, Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

Tiled = ForwardConfig | DqDrConfig | DkDvConfig


def default_config(spec: KernelSpec, shape: Shape, gpu: Gpu) -> KernelConfig:
    """A config that is valid for `spec` on `gpu` and reasonable for `shape`. Raises ConfigError if none is."""
    candidates = _candidates(spec, shape, gpu)
    reasons = [why_invalid(spec, config, gpu) for config in candidates]
    valid = [config for config, reason in zip(candidates, reasons, strict=True) if reason is None]
    if valid:
        return next((config for config in valid if _has_room(spec, config, gpu)), valid[-1])
    raise ConfigError(f"no default config fits {spec} on {gpu.title}: {'; '.join(map(str, reasons))}")


def promising_configs(spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[KernelConfig]:
    """The default, and what else was fast somewhere: where a search had better begin."""
    default = default_config(spec, shape, gpu)
    found = [default, *_candidates(spec, shape, gpu)]
    if isinstance(default, DecodeConfig) and default.NUM_SPLITS > 1:
        found += [replace(default, merge=merge) for merge in ("last", "kernel")]
        found += [replace(default, merge="kernel", num_warps=2, num_stages=3, BLOCK_N=64)]
    if isinstance(default, TileConfig):
        found += [_plain(c) if c != _plain(c) else _lean(c) for c in found[:3] if isinstance(c, TileConfig)]
        found += [replace(default, HEAD_GROUP=together) for together in (1, 4, 16, 0)]
        found += [replace(default, HEAD_DIM_AS=form) for form in forms_of(spec.head_dim)]
        # Three programs of 4 warps on a multiprocessor, not two, at the price of some spills.
        found += [replace(c, maxnreg=168) for c in found[:3] if isinstance(c, TileConfig)]
    return [config for config in dict.fromkeys(found) if why_invalid(spec, config, gpu) is None]


def _candidates(spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[KernelConfig]:
    if spec.op == "decode":
        return _decode_defaults(spec, shape, gpu)
    if spec.op == "preprocess":
        return [PreprocessConfig(BLOCK_M=m, num_warps=4) for m in (16, 32, 8)]
    return _tile_defaults(spec, shape, gpu)


def _has_room(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> bool:
    """Whether shared memory will do for more than the predicate counts: a default gets no second try."""
    return most_shared_bytes(spec, config, gpu) <= gpu.shared_per_block


def most_shared_bytes(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> int:
    """Shared memory that a kernel can take, where `space.shared_bytes` is what its tiles take at the least.

    From compiling: matmuls of Hopper and Blackwell, which run on while the program does, keep one more block in flight,
    and dqdr's up to half a block more; dkdv's on Blackwell are counted already. Those of other GPUs, and of tiles too
    small for the former, pass up to two padded tiles of scores from thread to thread.
    """
    if not isinstance(config, TileConfig):
        return shared_bytes(spec, config, gpu)
    more = config.BLOCK_M * (2 * config.BLOCK_N + 4) * spec.bytes_per_element
    if gpu.capability[0] == 10 and spec.op == "dkdv":
        more = KIB  # of rows' numbers
    elif gpu.capability[0] in (9, 10):
        more = max(more, block_bytes(spec, config) * (3 if spec.op == "dqdr" else 2) // 2)
    return shared_bytes(spec, config, gpu) + more + KIB


# (BLOCK_M, BLOCK_N, num_warps, num_stages), those first that were fastest on an H200 in bf16: at head_dim 96 and 128,
_TILES = {
    "forward": ((128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
    "dqdr": ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
    "dkdv": ((32, 64, 4, 3), (32, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2)),
}
# at 64,
_NARROW_TILES = {
    "forward": ((64, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3)),
    "dqdr": ((64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3)),
    "dkdv": ((64, 64, 4, 3), (32, 64, 4, 3), (64, 128, 8, 3)),
}
# and at 256, where few registers are left beside the sums.
_WIDE_TILES = {
    "forward": ((64, 64, 8, 2), (64, 32, 8, 3), (64, 32, 8, 2), (32, 64, 8, 2)),
    "dqdr": ((32, 32, 4, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
    "dkdv": ((64, 32, 8, 2), (32, 32, 4, 1), (32, 32, 8, 2)),
}
# With halves, faster there still.
_HALVES_TILES = {
    "forward": ((128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2)),
    "dqdr": ((128, 32, 8, 1), (64, 32, 4, 3), (64, 32, 4, 2), (64, 64, 8, 2)),
    "dkdv": ((32, 128, 8, 2), (32, 64, 4, 3), (32, 64, 4, 2)),
}
# Where head_dim is so wide, or the card so small, that none of them fits.
_SMALLEST = ((32, 64, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1))
# Without tensor cores registers bound the tiles.
_FP32_TILES = {
    "forward": ((64, 32, 8, 2), (32, 32, 4, 2), (32, 16, 8, 2), (16, 16, 4, 2)),
    "dqdr": ((32, 32, 8, 2), (16, 16, 4, 2)),
    "dkdv": ((32, 32, 8, 2), (16, 16, 4, 2)),
}


def _tile_defaults(spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[KernelConfig]:
    # As many heads together as have what they share, keys and values, in half of L2; for dkdv, the rows that each
    # kv head reads.
    if spec.op == "dkdv":
        a_head = 3 * shape.seqlen_q * shape.group * spec.head_dim * spec.bytes_per_element
        together = max(1, gpu.l2_bytes // 2 // a_head)
    else:
        a_head = 2 * shape.seqlen_kv * spec.head_dim * spec.bytes_per_element
        together = max(1, gpu.l2_bytes // 2 // a_head) * shape.group
    head_group = _floor_of(together, spec.op, "HEAD_GROUP")
    tiles = (_FP32_TILES if spec.dtype == "fp32" else _TILES)[spec.op]
    if spec.head_dim <= 64 and spec.dtype != "fp32":
        tiles = (*_NARROW_TILES[spec.op], *tiles)
    elif spec.head_dim > 128 and spec.dtype != "fp32":
        tiles = (*_WIDE_TILES[spec.op], *tiles)
    blocks = shape.batch * shape.heads * (shape.seqlen_q // 128 + 1)
    if blocks < gpu.sms:  # too few large tiles to fill the card
        tiles = tiles[1:]
    kind, forms = TILED[spec.op], forms_of(spec.head_dim)
    # From compiling: beside a piece of 128 there is no room for a narrow one, and the forward's tiles would be small.
    wide = spec.head_dim > 128 and "padded" in forms and (spec.op == "forward" or spec.head_dim % 64 > 0)
    form = "padded" if wide else forms[0]
    halves = _HALVES_TILES[spec.op] if "halves" in forms and spec.bytes_per_element == 2 else ()
    found = [
        *(kind(m, n, head_group, w, s, "halves") for m, n, w, s in halves),
        *(kind(m, n, head_group, w, s, form) for m, n, w, s in (*tiles, *_SMALLEST)),
    ]
    return [_lean(config) if _pays_to_be_lean(spec, config, gpu) else config for config in found]


def _lean(config: Tiled) -> Tiled:
    """With fewer instructions beside the matmuls, and of the backward's with more registers."""
    if isinstance(config, ForwardConfig):
        return replace(config, ROW_MAX="first")
    if isinstance(config, DkDvConfig):
        return replace(config, MASK="scores", ROW_NUMBERS="together")
    assert isinstance(config, DqDrConfig)
    return replace(config, MASK="scores")


def _plain(config: Tiled) -> Tiled:
    """Without."""
    return type(config)(*(getattr(config, f.name) for f in fields(TileConfig)))


def _pays_to_be_lean(spec: KernelSpec, config: Tiled, gpu: Gpu) -> bool:
    """Whether it did on an H100, in bf16 at head_dim 64, 96 and 128. Elsewhere nothing is known."""
    if gpu.capability[0] != 9 or spec.dtype != "bf16" or config.HEAD_DIM_AS == "halves" or spec.head_dim > 128:
        return False
    if isinstance(config, ForwardConfig):
        return not spec.window  # there each row's own key is read first, which 513 keys do not repay
    if isinstance(config, DkDvConfig):  # registers there were just enough
        return spec.causal and config.BLOCK_N == 64 and config.HEAD_DIM_AS == "whole"
    return spec.causal and not spec.window and spec.head_dim < 128


def _decode_defaults(spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[KernelConfig]:
    """Small programs, several on each multiprocessor, and as many splits as it takes to have them."""
    rows = spec.group * shape.seqlen_q
    block_h = 16 if rows > 8 else 8
    if rows > 64 and spec.dtype != "fp32":
        block_h = 64  # a prompt's rows: as many as there are registers for
    programs = shape.batch * shape.kv_heads * -(-rows // block_h)
    block_n = 32
    wanted = max(1, 2 * gpu.sms // programs)  # more would hide no more latency, and cost merging
    by_length = spec.ragged and not spec.many_queries
    if by_length:  # few sequences have as many keys as the longest, and those are to be shared too
        wanted = max(4, 3 * gpu.sms // programs)
    splits = _floor_of(min(wanted, -(-shape.seqlen_kv // block_n)), "decode", "NUM_SPLITS")
    # Past so many partial states one program is slower to join them than a kernel more, of a program for each head.
    merge = "none" if splits == 1 else "last" if splits * min(spec.group, block_h) <= 128 else "kernel"
    if spec.ragged:  # a long sequence among short ones gets most programs, whatever their average
        merge = "kernel" if by_length and splits > 1 else "last"
    tiles = [(block_n, block_h, w, s) for w, s in ((1, 4), (2, 3), (2, 2))]
    if block_h == 64:
        tall = [(64, 64, 8, 3), (64, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)]
        # From compiling, of heads wider than 128: 64 keys widened from 8 bits at a time spill up to a kilobyte, and 32
        # of them 200 bytes; asynchronous matmuls in tf32 spill 900, of 16 rows 320.
        if spec.head_dim > 128 and spec.cache_dtype:
            tall = [tall[0], tall[-1]]
        elif spec.head_dim > 128 and spec.dtype == "tf32" and gpu.capability[0] in (9, 10):
            tall.pop()
        tiles = [*tall, *((n, 16, w, s) for n, _, w, s in tiles)]
    elif spec.cache_dtype and spec.head_dim <= 64:
        pass  # from compiling: of so narrow heads each of two warps would widen all numbers
    elif spec.page_size or spec.cache_dtype:  # more is done for each key: two warps share it
        tiles = [(64, block_h, 2, 3), *tiles]
    elif spec.many_queries:
        tiles = [(32, block_h, 2, 4), *tiles]
    # Where head_dim is so wide, or its numbers are, that none of them fits.
    tiles += [(32, 8, 2, 2), (16, 8, 1, 2), (16, 8, 2, 2)]
    return [DecodeConfig(n, h, splits, merge, num_warps=w, num_stages=s) for n, h, w, s in tiles]


def _floor_of(size: int, op: str, knob_name: str) -> int:
    """The knob's largest value that is at most `size`."""
    values = next(knob.values for knob in KNOBS[op] if knob.name == knob_name)
    return max(v for v in values if isinstance(v, int) and 0 < v <= size)
