"""The forms of specs and configs in tests/data/same, and random specs, shapes and configs, the same in every run.

same_samples.py asks and answers.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from typing import Any

from parallax_gen.errors import ArgumentError
from parallax_gen.memory.old import TODAYS_NAMES, TODAYS_VALUES, config_of_record
from parallax_gen.memory.place import Place
from parallax_gen.ops.base import KernelConfig, config_to_dict
from parallax_gen.ops.space import default_config, knobs_of
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

# Fields that records always have, at their defaults.
OFF = {"group": 1, "causal": False, "stats": False, "ragged": False}

Json = Any


# -- conversion between the stored forms, which stay, and today's objects


def spec_from(stored: Json) -> KernelSpec:
    """The spec that is stored as `stored`, in which flags that are off may be omitted."""
    order = ("op", "head_dim", "dtype", *OFF)
    whole = {name: stored.get(name, OFF.get(name)) for name in order}
    whole |= {name: value for name, value in stored.items() if name not in whole}
    flat = {"gpu": "h200"} | {f"spec.{name}": value for name, value in whole.items()}
    sizes = {"kv_rows": 8, "seqlen_q": 1, "seqlen_kv": 128}
    return Place.from_flat(flat | {f"bucket.{name}": size for name, size in sizes.items()}).spec


def stored_spec(place: Place) -> Json:
    """The stored form of the place's spec, without flags that are off; the inverse of `spec_from`."""
    whole = {name.removeprefix("spec."): value for name, value in place.flat().items() if name.startswith("spec.")}
    return {name: value for name, value in whole.items() if name not in OFF or OFF[name] != value}


def kind_of(place: Place) -> str:
    stored = stored_spec(place)
    return "ragged" if stored.get("ragged") else str(stored["op"])


def config_from(spec: KernelSpec, stored: Json) -> KernelConfig:
    return config_of_record(spec.op, stored)


def stored_config(config: KernelConfig) -> Json:
    """The stored form of a config, with the field names of the time when the samples were written."""
    return {stored_name(name): stored_value(name, value) for name, value in config_to_dict(config).items()}


def stored_name(name: str) -> str:
    return next((old for old, new in TODAYS_NAMES.items() if new == name), name)


def stored_value(name: str, value: Json) -> Json:
    return next((old for old, new in TODAYS_VALUES.get(name, {}).items() if new == value), value)


def changes(default: KernelConfig, config: KernelConfig) -> Json:
    """The stored fields in which a config differs from the default; None for fields that only the default stores."""
    one, other = stored_config(default), stored_config(config)
    changed = {name: value for name, value in other.items() if name not in one or one[name] != value}
    return changed | {name: None for name in one if name not in other}


def text(value: Json) -> str:
    return json.dumps(value, separators=(",", ":"))


# -- the questions: random specs and shapes, the same in every run

KINDS = ("forward", "preprocess", "dkdv", "dqdr", "decode", "ragged")  # ragged: decode_varlen
# Values of knobs that are not valid for every spec.
OTHERS = {"merge": ("none", "last", "kernel"), "MASK": ("before_exp",), "SOFTMAX": ("fixed_reference",)}
FLAGS = ("causal", "stats", "window", "varlen", "leftpad", "many_queries")
ORDER = ("causal", "stats", "ragged", "window", "varlen", "page_size", "leftpad", "many_queries", "cache_dtype")
CARDS = ("h100", "h200", "b200", "a100", "l40s", "rtx3090", "rtx5090")


def draw_spec(draw: random.Random, kind: str) -> Json:
    """A random spec of the kind, in its stored form."""
    while True:
        dtype = draw.choice(("bf16", "bf16", "fp16", "fp32", "tf32"))
        head_dim = draw.choice((8, 40, 64, 64, 80, 96, 128, 128, 128, 192, 256))
        group = 1 if kind == "preprocess" else draw.choice((1, 1, 2, 4, 7, 8))
        flags: dict[str, Json] = {"ragged": kind == "ragged"} | {name: draw.random() < 0.45 for name in FLAGS}
        if kind == "ragged":
            flags["page_size"] = draw.choice((0, 0, 0, 1, 16, 64, 256))
            flags["cache_dtype"] = draw.choice(("", "", "", "e4m3", "e5m2"))
        op = "decode" if kind == "ragged" else kind
        stored = {"op": op, "head_dim": head_dim, "dtype": dtype, "group": group}
        stored |= {name: flags[name] for name in ORDER if flags.get(name)}
        try:
            spec_from(stored)
        except ArgumentError:  # incompatible flags
            continue
        return stored


def draw_shape(draw: random.Random, stored: Json) -> Json:
    kv_heads = draw.choice((1, 2, 4, 8, 16))
    lengths = (100, 128, 777, 2048, 4096, 16384)
    multi_token = stored["op"] != "decode" or stored.get("many_queries", False)
    seqlen_q = draw.choice(lengths) if multi_token else 1
    seqlen_kv = seqlen_q if multi_token and draw.random() < 0.6 else draw.choice((*lengths, 131072))
    window = draw.choice((1, 128, 513, 4096)) if stored.get("window") else 0
    return [draw.choice((1, 2, 3, 8, 32)), kv_heads * stored["group"], kv_heads, seqlen_q, seqlen_kv, window]


def draw_cases(seed: int, each: int) -> Iterator[tuple[str, Json, Json]]:
    """(gpu, spec, shape): `each` of every kind, and twice as many of decode_varlen, which has the most flags."""
    draw = random.Random(seed)
    for kind in (*KINDS, "ragged"):
        for _ in range(each):
            stored = draw_spec(draw, kind)
            yield draw.choice(CARDS), stored, draw_shape(draw, stored)


def draw_config(draw: random.Random, spec: KernelSpec) -> Json:
    """A random value for each knob of the op, compatible or not, and sometimes an invalid value."""
    config = config_to_dict(default_config(spec, Shape(1, spec.group, 1, 1, 128), GPUS["h200"]))
    for knob in knobs_of(spec):
        values = (
            *knob.values,
            *OTHERS.get(knob.name, ()),
        )
        config[knob.name] = draw.choice(values)
    if draw.random() < 0.2:
        config["num_warps"] = 3
    if draw.random() < 0.2 and "BLOCK_H" in config:
        config["BLOCK_H"] = 64
    if draw.random() < 0.2 and "HEAD_DIM_LAYOUT" in config:
        config["HEAD_DIM_LAYOUT"] = draw.choice(("native", "chunked", "split"))
    return config_to_dict(config_from(spec, config))


def by_chance(line: str) -> str:
    """A sort key that shuffles lines reproducibly."""
    return hashlib.sha256(line.encode()).hexdigest()
