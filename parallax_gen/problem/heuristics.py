"""The config to use where nothing was measured: the tuner's first trial and the dispatcher's last resort."""

from __future__ import annotations

from parallax_gen.errors import ConfigError
from parallax_gen.problem.config import DecodeConfig, ForwardConfig, KernelConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.space import KNOBS, why_invalid
from parallax_gen.problem.spec import KernelSpec


def default_config(spec: KernelSpec, shape: Shape, gpu: Gpu) -> KernelConfig:
    """A config that is valid for `spec` on `gpu` and reasonable for `shape`. Raises ConfigError if none is."""
    candidates = _forward_defaults(spec, shape, gpu) if spec.op == "forward" else _decode_defaults(spec, shape, gpu)
    reasons = []
    for config in candidates:
        reason = why_invalid(spec, config, gpu)
        if reason is None:
            return config
        reasons.append(reason)
    raise ConfigError(f"no default config fits {spec} on {gpu.title}: {'; '.join(reasons)}")


def _forward_defaults(spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[KernelConfig]:
    """From the largest tile that pays to the smallest that always fits."""
    # As many heads together as have their keys and values in half of L2; at least those that share them.
    kv_bytes = 2 * shape.seqlen_kv * spec.head_dim * spec.bytes_per_element
    together = max(1, gpu.l2_bytes // 2 // kv_bytes) * shape.group
    head_group = _floor_of(together, "forward", "HEAD_GROUP")
    tiles = [(128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)]
    if spec.dtype == "fp32":
        # Without tensor cores registers bound the tiles.
        tiles = [(64, 32, 8, 2), (32, 32, 4, 2), (32, 16, 8, 2), (16, 16, 4, 2)]
    blocks = shape.batch * shape.heads * (shape.seqlen_q // 128 + 1)
    if blocks < gpu.sms:  # too few large tiles to fill the card
        tiles = tiles[1:]
    return [
        ForwardConfig(BLOCK_M=m, BLOCK_N=n, HEAD_GROUP=head_group, num_warps=w, num_stages=s) for m, n, w, s in tiles
    ]


def _decode_defaults(spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[KernelConfig]:
    """Small programs, several on each multiprocessor, and as many splits as it takes to have them."""
    block_h = 16 if spec.group > 8 else 8
    head_blocks = -(-spec.group // block_h)
    programs = shape.batch * shape.kv_heads * head_blocks
    block_n = 32
    wanted = max(1, 2 * gpu.sms // programs)  # more would hide no more latency, and cost merging
    splits = _floor_of(min(wanted, -(-shape.seqlen_kv // block_n)), "decode", "NUM_SPLITS")
    merge = "none" if splits == 1 else "last"
    return [
        DecodeConfig(block_n, block_h, splits, merge, num_warps=w, num_stages=s) for w, s in ((1, 4), (2, 3), (2, 2))
    ]


def _floor_of(size: int, op: str, knob_name: str) -> int:
    """The knob's largest value that is at most `size`."""
    values = next(knob.values for knob in KNOBS[op] if knob.name == knob_name)
    return max(v for v in values if isinstance(v, int) and 0 < v <= size)
