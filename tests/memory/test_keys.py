"""A key goes to text and back, and says what differs."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_samples import ENVIRONMENT, KEY, OTHER_BUCKET, OTHER_GPU, OTHER_TRITON, SHAPE, config, result
from strategies import random_spec

from parallax_gen.errors import ArgumentError, ConfigError
from parallax_gen.memory import keys as keys_module
from parallax_gen.memory import toolchain
from parallax_gen.memory.keys import Environment, Key
from parallax_gen.memory.results import Result, reading_order
from parallax_gen.problem.config import (
    TILED,
    DecodeConfig,
    PreprocessConfig,
    config_from_dict,
    config_to_dict,
    config_to_json,
)
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import DTYPES, OPS, KernelSpec

powers = st.integers(0, 20).map(lambda n: 1 << n)
specs = st.builds(lambda draw, op: random_spec(draw, op, DTYPES), st.randoms(), st.sampled_from(OPS))
environments = st.builds(Environment, st.text(), st.text(), st.integers(0), st.text(), st.integers(0))
buckets = st.builds(Bucket, powers, powers, powers, st.just(0) | powers)
keys = st.builds(Key, st.text(), specs, buckets, environments)

numbers = st.integers(0, 1024)
tile_configs = {
    op: st.builds(kind, *5 * [numbers], st.sampled_from(["whole", "pieces", "padded"])) for op, kind in TILED.items()
}
configs = {
    **tile_configs,
    "preprocess": st.builds(PreprocessConfig, numbers, numbers),
    "decode": st.builds(
        DecodeConfig, numbers, numbers, numbers, st.sampled_from(["none", "last", "kernel"]), numbers, numbers
    ),
}


@given(keys)
def test_key_survives_json(key: Key) -> None:
    back = Key.from_flat(json.loads(json.dumps(key.flat())))
    assert back == key
    assert back.digest == key.digest
    assert back.diff(key) == {}


@given(keys, keys)
def test_diff_is_empty_only_for_equal_keys(one: Key, other: Key) -> None:
    assert (one.diff(other) == {}) == (one == other) == (one.digest == other.digest)
    assert {name: pair[::-1] for name, pair in one.diff(other).items()} == other.diff(one)


CACHES = ("spec.page_size", "spec.leftpad", "spec.many_queries", "spec.cache_dtype")
TOOLS = ("environment.cuda", "environment.space")
# Fields that came after records were first written, and their defaults.
LATER = {
    **dict.fromkeys(("spec.window", "spec.varlen", *CACHES), False),
    "spec.page_size": 0,
    "spec.cache_dtype": "",
    "bucket.window": 0,
    "environment.cuda": "",
    "environment.space": 1,
}
LATEST = dataclasses.replace(
    KEY,
    spec=dataclasses.replace(KEY.spec, window=True, varlen=True),
    bucket=dataclasses.replace(KEY.bucket, window=1024),
)
TODAYS = dataclasses.replace(LATEST, environment=dataclasses.replace(ENVIRONMENT, cuda="12.8/12.9", space=2))
PAGED = dataclasses.replace(
    KEY,
    spec=KernelSpec(
        "decode", 64, "bf16", ragged=True, page_size=16, leftpad=True, many_queries=True, cache_dtype="e4m3"
    ),
)


def test_every_field_counts() -> None:
    """A field added to a key's parts must reach its text, or two different keys would share results."""
    parts = {"spec": KEY.spec, "bucket": KEY.bucket, "environment": KEY.environment}
    names = ["gpu", *(f"{part}.{f.name}" for part, value in parts.items() for f in dataclasses.fields(value))]
    assert list(TODAYS.flat()) == [name for name in names if name not in CACHES]
    assert list(LATEST.flat()) == [name for name in names if name not in (*CACHES, *TOOLS)]
    assert list(PAGED.flat()) == [name for name in names if name not in LATER or name in CACHES]
    assert list(PAGED.every_field()) == list(TODAYS.every_field()) == list(KEY.every_field()) == names
    assert list(KEY.flat()) == [name for name in names if name not in LATER]


@given(keys)
def test_a_field_is_left_out_only_at_the_default_of_a_later_one(key: Key) -> None:
    flat, every = key.flat(), key.every_field()
    assert {name: value for name, value in every.items() if name in flat} == flat
    assert {name for name in every if name not in flat} == {n for n, default in LATER.items() if every[n] == default}


@pytest.mark.parametrize(
    ("name", "told", "value"),
    [
        ("spec.window", None, True),
        ("spec.varlen", None, True),
        ("bucket.window", None, 256),
        ("environment.cuda", "", "12.8/12.9"),
        ("environment.space", 1, 2),
    ],
)
def test_later_fields_make_other_keys(name: str, told: object, value: object) -> None:
    part, _, field = name.partition(".")
    other = dataclasses.replace(KEY, **{part: dataclasses.replace(getattr(KEY, part), **{field: value})})
    assert other.digest != KEY.digest
    assert KEY.diff(other) == {name: (told, value)}
    assert other.diff(KEY) == {name: (value, told)}


def test_diff_names_the_fields() -> None:
    assert KEY.diff(OTHER_TRITON) == {"environment.triton": ("3.5", "3.6")}
    assert KEY.diff(OTHER_BUCKET) == {"bucket.seqlen_q": (4096, 8192), "bucket.seqlen_kv": (4096, 8192)}
    assert KEY.diff(OTHER_GPU) == {"gpu": ("h200", "h100")}


def test_the_key_of_this_process_has_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Key.here(KEY.gpu, KEY.spec, KEY.bucket, "abc123")
    assert (here.environment.triton, here.environment.cuda) == (toolchain.triton_version(), toolchain.cuda_version())
    space = keys_module.SPACE
    monkeypatch.setattr(keys_module, "SPACE", 7)
    assert here.diff(Key.here(KEY.gpu, KEY.spec, KEY.bucket, "abc123")) == {"environment.space": (space, 7)}


def test_digest_stays() -> None:
    """A digest that moves makes everybody's rows unused: to be done knowingly."""
    assert KEY.digest == "b9978288d8e3dee0538c82a2ef842fa8"
    assert LATEST.digest == "d4443e6f4a1c80f0500e484e7c787b18"
    assert TODAYS.digest == "2c8ea3e292e965f75e943365a7c8d56f"


# As records were written before windows, packed sequences and heads in pieces.
EARLIER = """{
    "key": {
        "gpu": "h200", "spec.op": "forward", "spec.head_dim": 128, "spec.dtype": "bf16", "spec.group": 4,
        "spec.causal": true, "spec.stats": false, "spec.ragged": false,
        "bucket.kv_rows": 8, "bucket.seqlen_q": 4096, "bucket.seqlen_kv": 4096,
        "environment.templates": "abc123", "environment.triton": "3.5", "environment.protocol": 1
    },
    "config": {"BLOCK_M": 128, "BLOCK_N": 64, "HEAD_GROUP": 0, "num_warps": 8, "num_stages": 3},
    "outcome": "ok",
    "shape": {"batch": 1, "heads": 32, "kv_heads": 8, "seqlen_q": 4096, "seqlen_kv": 4096},
    "time_us": 100.0, "time_us_p20": 99.0, "time_us_p80": 101.0, "error": 0.0023, "registers": 168, "spills": 0,
    "shared_bytes": 98304, "compile_s": 0.7, "detail": "", "created_at": "2026-01-01T00:00:00+00:00", "source": ""
}"""


def test_records_from_before_later_fields_read_and_count_as_they_did() -> None:
    data = json.loads(EARLIER)
    found = Result.from_dict(data)
    assert found.to_dict() == data
    assert json.dumps(found.to_dict()) == json.dumps(data)  # in the same order, too
    assert found.key == KEY
    assert (found.config, found.shape) == (config(), SHAPE)
    digest = hashlib.sha256(json.dumps(data["key"], sort_keys=True).encode()).hexdigest()[:32]
    assert found.identity == (digest, json.dumps(data["config"], sort_keys=True))
    assert digest == "b9978288d8e3dee0538c82a2ef842fa8"


CONFIG_OF = {
    **{op: kind(128, 64, 1, 8, 3) for op, kind in TILED.items()},
    "preprocess": PreprocessConfig(32, 4),
    "decode": DecodeConfig(64, 8, 4, "last", 4, 2),
}


@given(keys, keys)
def test_keys_sort_field_by_field_whichever_they_leave_out(one: Key, other: Key) -> None:
    rows = [result(key=key, config=CONFIG_OF[key.spec.op]) for key in (one, other, one)]
    first, second, third = sorted(rows, key=reading_order)
    assert second.key in (first.key, third.key)  # rows of one key stay together
    fields = [[*row.key.every_field().values()] for row in (first, second, third)]
    assert fields == sorted(fields)


def test_keys_that_leave_out_different_fields_sort() -> None:
    windowed = dataclasses.replace(KEY, spec=dataclasses.replace(KEY.spec, window=True), bucket=Bucket(128, 128, 128))
    plain = dataclasses.replace(KEY, bucket=Bucket(1, 128, 128))
    rows = [result(key=key) for key in (windowed, plain)]
    assert sorted(rows, key=reading_order) == rows[::-1]


@pytest.mark.parametrize("name", [*KEY.flat()], ids="without {}".format)
def test_missing_field_is_refused(name: str) -> None:
    flat = KEY.flat()
    del flat[name]
    with pytest.raises((ArgumentError, KeyError)):
        Key.from_flat(flat)


@pytest.mark.parametrize("name", ["spec.color", "bucket.color", "environment.color", "color.of"])
def test_unknown_field_is_refused(name: str) -> None:
    with pytest.raises((ArgumentError, KeyError)):
        Key.from_flat({**KEY.flat(), name: 1})


@pytest.mark.parametrize("op", OPS)
@given(st.data())
def test_config_survives_json(op: str, data: st.DataObject) -> None:
    config = data.draw(configs[op])
    text = config_to_json(config)
    assert config_from_dict(op, json.loads(text)) == config
    assert config_to_json(config_from_dict(op, dict(reversed(config_to_dict(config).items())))) == text


@pytest.mark.parametrize("op", TILED)
def test_a_head_in_one_piece_is_not_written_as_it_was_not_in_earlier_records(op: str) -> None:
    earlier = {"BLOCK_M": 128, "BLOCK_N": 64, "HEAD_GROUP": 0, "num_warps": 8, "num_stages": 3}
    whole = TILED[op](128, 64, 0, 8, 3)
    assert config_from_dict(op, earlier) == whole == TILED[op](128, 64, 0, 8, 3, "whole")
    assert config_to_json(whole) == json.dumps(earlier, sort_keys=True)
    assert config_to_dict(TILED[op](128, 64, 0, 8, 3, "pieces")) == earlier | {"HEAD_DIM_AS": "pieces"}
    assert config_from_dict(op, earlier | {"HEAD_DIM_AS": "pieces"}) == TILED[op](128, 64, 0, 8, 3, "pieces")


@pytest.mark.parametrize(
    "change", [{"BLOCK_M": "128"}, {"BLOCK_M": True}, {"BLOCK_M": 128.0}, {"color": 1}, {"HEAD_DIM_AS": 1}]
)
def test_config_of_wrong_fields_is_refused(change: dict[str, object]) -> None:
    data = {"BLOCK_M": 128, "BLOCK_N": 64, "HEAD_GROUP": 0, "num_warps": 8, "num_stages": 3}
    with pytest.raises(ConfigError):
        config_from_dict("forward", data | change)
