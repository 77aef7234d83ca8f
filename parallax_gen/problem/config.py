"""How a kernel is done: the choices that change its speed and never its result. JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from parallax_gen.errors import ConfigError


@dataclass(frozen=True)
class ForwardConfig:
    """Choices of the attention forward.

    BLOCK_M      query rows a program owns
    BLOCK_N      keys it takes a step
    HEAD_GROUP   query heads whose tiles are launched together, longest rows first: fewer keep K and V in L2,
                 more spread the causal triangle evenly; 0 is all heads at once
    num_warps    warps a program
    num_stages   key blocks in flight
    """

    BLOCK_M: int
    BLOCK_N: int
    HEAD_GROUP: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DecodeConfig:
    """Choices of the single-query decode.

    BLOCK_N      keys a program takes a step
    BLOCK_H      query heads a program serves: their queries and probes fill one tile of 2*BLOCK_H rows
    NUM_SPLITS   programs that share one sequence's keys
    merge        who joins the splits: "none" (one split), "last" (the last to arrive), "kernel" (a second kernel)
    num_warps    warps a program
    num_stages   key blocks in flight
    """

    BLOCK_N: int
    BLOCK_H: int
    NUM_SPLITS: int
    merge: str
    num_warps: int
    num_stages: int


KernelConfig = ForwardConfig | DecodeConfig

CONFIG_OF_OP: dict[str, type[ForwardConfig] | type[DecodeConfig]] = {
    "forward": ForwardConfig,
    "decode": DecodeConfig,
}


def config_to_dict(config: KernelConfig) -> dict[str, Any]:
    return asdict(config)


def config_from_dict(op: str, data: Mapping[str, Any]) -> KernelConfig:
    """The config of `op` that `config_to_dict` wrote. Raises ConfigError on a wrong field or type."""
    kind = CONFIG_OF_OP[op]
    expected = {f.name: f.type for f in fields(kind)}
    if set(data) != set(expected):
        raise ConfigError(f"a {op} config has the fields {sorted(expected)}, not {sorted(data)}")
    for name, value in data.items():
        if type(value).__name__ != expected[name]:
            raise ConfigError(f"{op} config field {name} is {value!r}; it must be of type {expected[name]}")
    return kind(**data)


def config_to_json(config: KernelConfig) -> str:
    """One line, keys sorted: the same config always gives the same text."""
    return json.dumps(config_to_dict(config), sort_keys=True)


def describe(config: KernelConfig) -> str:
    """For people: `BLOCK_M=128 BLOCK_N=64 ...`. Never parsed back."""
    return " ".join(f"{name}={value}" for name, value in config_to_dict(config).items())
