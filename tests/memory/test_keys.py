"""A key goes to text and back, and says what differs."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_samples import KEY, OTHER_BUCKET, OTHER_GPU, OTHER_TRITON

from parallax_gen.errors import ArgumentError, ConfigError
from parallax_gen.memory.keys import Environment, Key
from parallax_gen.problem.config import (
    DecodeConfig,
    ForwardConfig,
    config_from_dict,
    config_to_dict,
    config_to_json,
)
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import DTYPES, HEAD_DIMS, KernelSpec

dims, dtypes = st.sampled_from(HEAD_DIMS), st.sampled_from(DTYPES)
groups, powers = st.integers(1, 64), st.integers(0, 20).map(lambda n: 1 << n)
forwards = st.builds(KernelSpec, st.just("forward"), dims, dtypes, groups, st.booleans(), st.booleans())
decodes = st.builds(KernelSpec, st.just("decode"), dims, dtypes, groups, ragged=st.booleans())
environments = st.builds(Environment, st.text(), st.text(), st.integers(0))
keys = st.builds(Key, st.text(), forwards | decodes, st.builds(Bucket, powers, powers, powers), environments)

numbers = st.integers(0, 1024)
forward_configs = st.builds(ForwardConfig, numbers, numbers, numbers, numbers, numbers)
decode_configs = st.builds(
    DecodeConfig, numbers, numbers, numbers, st.sampled_from(["none", "last", "kernel"]), numbers, numbers
)


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


def test_every_field_counts() -> None:
    """A field added to a key's parts must reach its text, or two different keys would share results."""
    parts = (KEY.spec, KEY.bucket, KEY.environment)
    count = 1 + sum(len(dataclasses.fields(part)) for part in parts)
    assert len(KEY.flat()) == count


def test_diff_names_the_fields() -> None:
    assert KEY.diff(OTHER_TRITON) == {"environment.triton": ("3.5", "3.6")}
    assert KEY.diff(OTHER_BUCKET) == {"bucket.seqlen_q": (4096, 8192), "bucket.seqlen_kv": (4096, 8192)}
    assert KEY.diff(OTHER_GPU) == {"gpu": ("h200", "h100")}


def test_digest_stays() -> None:
    """A digest that moves makes everybody's rows unused: to be done knowingly."""
    assert KEY.digest == "b9978288d8e3dee0538c82a2ef842fa8"


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


@given(forward_configs | decode_configs)
def test_config_survives_json(config: ForwardConfig | DecodeConfig) -> None:
    op = "forward" if isinstance(config, ForwardConfig) else "decode"
    text = config_to_json(config)
    assert config_from_dict(op, json.loads(text)) == config
    assert config_to_json(config_from_dict(op, dict(reversed(config_to_dict(config).items())))) == text


@pytest.mark.parametrize("change", [{"BLOCK_M": "128"}, {"BLOCK_M": True}, {"BLOCK_M": 128.0}, {"color": 1}])
def test_config_of_wrong_fields_is_refused(change: dict[str, object]) -> None:
    data = {"BLOCK_M": 128, "BLOCK_N": 64, "HEAD_GROUP": 0, "num_warps": 8, "num_stages": 3}
    with pytest.raises(ConfigError):
        config_from_dict("forward", data | change)
