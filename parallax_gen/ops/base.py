"""How a kernel is done: the choices that change its speed and never its result. JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from typing import Any

from parallax_gen.errors import ConfigError


@dataclass(frozen=True)
class TileConfig:
    """Choices of a kernel that owns a block of rows or of keys, and steps over blocks of the other.

    BLOCK_M      query rows a tile
    BLOCK_N      keys a tile
    HEAD_GROUP   heads whose tiles are launched together, those with most work first: fewer keep what they share in
                 L2, more spread the causal triangle evenly; 0 is all heads at once
    num_warps    warps a program
    num_stages   blocks in flight
    HEAD_DIM_AS  what a row of head_dim numbers is to the tensor cores: "whole", a power of two; "pieces", powers of
                 two side by side (96 = 64 + 32); "padded", the next power of two, filled with zeros; "halves", for wide
                 heads: two programs share a tile, find all scores each, and sum one half of the dimensions each
    maxnreg      registers a thread at the most, so that more programs run on a multiprocessor; 0 for as many as it
                 takes
    """

    BLOCK_M: int
    BLOCK_N: int
    HEAD_GROUP: int
    num_warps: int
    num_stages: int
    HEAD_DIM_AS: str = "whole"
    maxnreg: int = 0


@dataclass(frozen=True)
class ForwardConfig(TileConfig):
    """The forward: a program owns BLOCK_M query rows and steps over keys.

    ROW_MAX  what a row's scores are measured against: "running", the largest so far, which its sums are scaled to in
             every step; "first", the score of a key that it sees, from begin to end: a second kernel does those tiles
             again, with a running maximum, whose sums ran over
    """

    ROW_MAX: str = "running"


@dataclass(frozen=True)
class DqDrConfig(TileConfig):
    """The gradients of q and r: a program owns BLOCK_M query rows and steps over keys.

    MASK  what a causal mask is put on: "weights", in every block, or in those that a window's edge or the diagonal
          crosses; "scores", before the exponential, in those blocks alone
    """

    MASK: str = "weights"


@dataclass(frozen=True)
class DkDvConfig(TileConfig):
    """The gradients of k and v: a program owns BLOCK_N keys and steps over the rows of every query head of its group.

    HEAD_GROUP counts kv heads here.

    MASK         what a causal mask is put on, in the blocks that the diagonal or a window's edge crosses: "weights",
                 or, before the exponential, "scores"
    ROW_NUMBERS  how a step loads the four numbers of each query row: "apart", where each is used, which takes fewer
                 registers, or "together", which takes fewer instructions
    """

    MASK: str = "weights"
    ROW_NUMBERS: str = "apart"


@dataclass(frozen=True)
class PreprocessConfig:
    """Choices of the backward's first kernel, which is bound by memory.

    BLOCK_M      query rows a program owns
    num_warps    warps a program
    """

    BLOCK_M: int
    num_warps: int


@dataclass(frozen=True)
class DecodeConfig:
    """Choices of decode.

    BLOCK_N      keys a program takes a step
    BLOCK_H      query heads a program serves, or (query, head) pairs: their queries and probes fill one tile of
                 2*BLOCK_H rows
    NUM_SPLITS   programs that share one sequence's keys; on the average where each has its own length
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


KernelConfig = ForwardConfig | DqDrConfig | DkDvConfig | PreprocessConfig | DecodeConfig

TILED: dict[str, type[ForwardConfig] | type[DqDrConfig] | type[DkDvConfig]] = {
    "forward": ForwardConfig,
    "dqdr": DqDrConfig,
    "dkdv": DkDvConfig,
}
CONFIG_OF_OP: dict[str, type[KernelConfig]] = {**TILED, "preprocess": PreprocessConfig, "decode": DecodeConfig}


LARGEST = 2**31 - 1  # of a number in a config, and
LONGEST = 64  # characters of a word: far beyond any knob's values


def config_to_dict(config: KernelConfig) -> dict[str, Any]:
    """Every field but those at a default: fields have one that came after records were first written."""
    return {f.name: value for f in fields(config) if (value := getattr(config, f.name)) != f.default}


def config_from_dict(op: str, data: Mapping[str, Any]) -> KernelConfig:
    """The config of `op` that `config_to_dict` wrote. Raises ConfigError on a wrong field or type.

    Values need not be those of today's knobs, which `problem.space.why_invalid` knows; numbers and words are bounded.
    """
    kind = CONFIG_OF_OP[op]
    expected = {f.name: f.type for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING}
    if not needed <= set(data) <= set(expected):
        raise ConfigError(f"a {op} config has the fields {sorted(expected)}, not {sorted(data)}")
    for name, value in data.items():
        if type(value).__name__ != expected[name]:
            raise ConfigError(f"{op} config field {name} is {value!r:.80}; it must be of type {expected[name]}")
        if isinstance(value, int) and not 0 <= value <= LARGEST:
            raise ConfigError(f"{op} config field {name} is {value!r:.80}; it must be from 0 to {LARGEST}")
        if isinstance(value, str) and not (value.isprintable() and len(value) <= LONGEST):
            raise ConfigError(
                f"{op} config field {name} is {value!r:.80}; it must be a word of at most {LONGEST} letters"
            )
    return kind(**data)


@lru_cache(maxsize=4096)
def config_to_json(config: KernelConfig) -> str:
    """One line, keys sorted: the same config always gives the same text."""
    return json.dumps(config_to_dict(config), sort_keys=True)
