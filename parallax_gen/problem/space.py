"""Which configs there are: each op's knobs, typed, and the one predicate that says what cannot work."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from parallax_gen.problem.config import (
    CONFIG_OF_OP,
    DecodeConfig,
    ForwardConfig,
    KernelConfig,
    config_from_dict,
    config_to_dict,
)
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.spec import KernelSpec

Value = int | str


@dataclass(frozen=True)
class Knob:
    """One field of a config: the values it may take, in the order in which they are neighbours."""

    name: str
    values: tuple[Value, ...]

    def neighbours(self, value: Value) -> tuple[Value, ...]:
        """The values one step away from `value`."""
        at = self.values.index(value)
        return self.values[max(0, at - 1) : at] + self.values[at + 1 : at + 2]


KNOBS: dict[str, tuple[Knob, ...]] = {
    "forward": (
        Knob("BLOCK_M", (16, 32, 64, 128)),
        Knob("BLOCK_N", (16, 32, 64, 128)),
        Knob("HEAD_GROUP", (1, 2, 4, 8, 16, 32, 0)),
        Knob("num_warps", (4, 8)),
        Knob("num_stages", (2, 3, 4)),
    ),
    "decode": (
        Knob("BLOCK_N", (16, 32, 64, 128)),
        Knob("BLOCK_H", (8, 16, 32)),
        Knob("NUM_SPLITS", (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)),
        Knob("merge", ("none", "last", "kernel")),
        Knob("num_warps", (1, 2, 4)),
        Knob("num_stages", (2, 3, 4, 5, 6)),
    ),
}


def knobs_of(spec: KernelSpec) -> tuple[Knob, ...]:
    """The op's knobs, without the values that no config of this spec can use."""
    return tuple(replace(knob, values=_usable(spec, knob)) for knob in KNOBS[spec.op])


def why_invalid(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> str | None:
    """Why `config` cannot serve `spec` on `gpu`, in a sentence; None when it can be tried.

    The one predicate of tuner, heuristics and dispatcher. What only compiling can show (registers, spills)
    is not its business.
    """
    if type(config) is not CONFIG_OF_OP[spec.op]:
        return f"a {type(config).__name__} does not configure a {spec.op} kernel"
    for knob in KNOBS[spec.op]:
        value = getattr(config, knob.name)
        if value not in knob.values:
            return f"{knob.name} is {value}; it may be one of {', '.join(map(str, knob.values))}"
    if isinstance(config, ForwardConfig):
        reason = _why_forward_invalid(spec, config)
    else:
        reason = _why_decode_invalid(spec, config)
    if reason is None and (shared := shared_bytes(spec, config)) > gpu.shared_per_block:
        reason = f"its tiles need {shared} bytes of shared memory; a block of {gpu.title} has {gpu.shared_per_block}"
    return reason


def shared_bytes(spec: KernelSpec, config: KernelConfig) -> int:
    """Shared memory the pipeline needs at the least: the key blocks in flight, and resident tiles."""
    kv_block = 2 * config.BLOCK_N * spec.head_dim * spec.bytes_per_element
    if isinstance(config, ForwardConfig):
        # Triton keeps num_stages - 1 blocks in flight when the loads feed matmuls; q and r stay resident.
        resident = 2 * config.BLOCK_M * spec.head_dim * spec.bytes_per_element
        return (config.num_stages - 1) * kv_block + resident
    return (config.num_stages - 1) * kv_block


def neighbours(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> list[KernelConfig]:
    """The valid configs that differ from `config` in one knob by one step."""
    found = []
    for knob in knobs_of(spec):
        for value in knob.neighbours(getattr(config, knob.name)):
            near = coerce(spec, {**config_to_dict(config), knob.name: value})
            if near not in found and near != config and why_invalid(spec, near, gpu) is None:
                found.append(near)
    return found


def every_config(spec: KernelSpec, gpu: Gpu) -> Iterator[KernelConfig]:
    """Every valid config, each once."""
    knobs = knobs_of(spec)
    for values in itertools.product(*(knob.values for knob in knobs)):
        config = config_from_dict(spec.op, dict(zip((knob.name for knob in knobs), values, strict=True)))
        if why_invalid(spec, config, gpu) is None:
            yield config


def coerce(spec: KernelSpec, choices: dict[str, Value]) -> KernelConfig:
    """The config nearest to `choices` whose knobs agree with each other: one split has nothing to merge."""
    if spec.op == "decode":
        if choices["NUM_SPLITS"] == 1:
            choices = {**choices, "merge": "none"}
        elif choices["merge"] == "none":
            choices = {**choices, "merge": "last"}
    return config_from_dict(spec.op, choices)


def _usable(spec: KernelSpec, knob: Knob) -> tuple[Value, ...]:
    if knob.name == "BLOCK_H":
        return tuple(v for v in knob.values if isinstance(v, int) and not _half_empty(spec, v))
    if (spec.op, knob.name) == ("forward", "BLOCK_N") and spec.dtype != "fp32":
        return tuple(v for v in knob.values if v != 16)  # tensor cores want more keys at a time
    return knob.values


def _half_empty(spec: KernelSpec, block_h: int) -> bool:
    """Whether a tile taller than need be, 8, has rows for twice the heads of a group or more: mostly padding."""
    return block_h > 8 and block_h >= 2 * spec.group


def _why_forward_invalid(spec: KernelSpec, config: ForwardConfig) -> str | None:
    tile = f"a {config.BLOCK_M}x{config.BLOCK_N} tile"
    if spec.dtype == "fp32":
        # Without tensor cores a thread holds its share of the operands too: from compiling, beyond this they spill
        # by hundreds of bytes, and soon by thousands.
        if config.BLOCK_M * config.BLOCK_N * spec.head_dim**2 > config.num_warps << 20:
            return (
                f"{tile} of fp32 at head_dim {spec.head_dim} is too large for the registers of {config.num_warps} warps"
            )
    elif config.BLOCK_N == 16 or max(config.BLOCK_M, config.BLOCK_N) < 16 * config.num_warps:
        return f"{tile} is too small for {config.num_warps} warps"
    # o1 and o2 stay in registers, beside s and t: past 255 registers a thread they spill for certain.
    accumulators = 2 * config.BLOCK_M * (spec.head_dim + config.BLOCK_N)
    a_thread = accumulators // (32 * config.num_warps)
    if a_thread > 255:
        return f"its accumulators need {a_thread} registers a thread; there are 255"
    return None


def _why_decode_invalid(spec: KernelSpec, config: DecodeConfig) -> str | None:
    if _half_empty(spec, config.BLOCK_H):
        return f"BLOCK_H {config.BLOCK_H} would be half empty for {spec.group} query heads a kv head"
    if (config.NUM_SPLITS == 1) != (config.merge == "none"):
        return f"merge {config.merge!r} does not go with NUM_SPLITS {config.NUM_SPLITS}"
    if config.BLOCK_N < 8 * config.num_warps:
        return f"{config.num_warps} warps have less than 8 of {config.BLOCK_N} keys each"
    a_thread = 2 * config.BLOCK_H * (spec.head_dim + config.BLOCK_N) // (32 * config.num_warps)
    if a_thread > 255:
        return f"its accumulators need {a_thread} registers a thread; there are 255"
    return None


for _op, _kind in CONFIG_OF_OP.items():  # a knob that is missing or misnamed shows at import, not in a tune
    assert [knob.name for knob in KNOBS[_op]] == [f.name for f in fields(_kind)], _op
