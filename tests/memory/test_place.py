"""Places and records round-trip through text, including those of earlier versions."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_samples import EVIDENCE, PLACE, SHAPE, config, result
from strategies import random_spec

from parallax_gen.errors import ArgumentError, ConfigError
from parallax_gen.memory.place import Place, place_of
from parallax_gen.memory.result import Evidence, Result, reading_order
from parallax_gen.ops.base import OPS_BY_NAME, OpKind, config_from_dict, config_to_dict, config_to_json
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.preprocess import PreprocessConfig
from parallax_gen.problem.shapes import Bucket, Shape, bucket_of
from parallax_gen.problem.spec import DTYPES, NAMES_IN_RECORDS, OPS, KernelSpec

TILED = {op.name: op.config for op in OPS_BY_NAME.values() if op.kind is OpKind.TILES}

powers = st.integers(0, 20).map(lambda n: 1 << n)
specs = st.builds(lambda draw, op: random_spec(draw, op, DTYPES), st.randoms(), st.sampled_from(OPS))
buckets = st.builds(Bucket, powers, powers, powers, st.just(0) | powers)
cards = st.from_regex("[A-Za-z0-9][ -.0-~]{0,20}", fullmatch=True)
places = st.builds(Place, cards, specs, buckets)

numbers = st.integers(0, 1024)
tile_configs = {
    op: st.builds(kind, *5 * [numbers], st.sampled_from(["native", "chunked", "padded"])) for op, kind in TILED.items()
}
configs = {
    **tile_configs,
    "preprocess": st.builds(PreprocessConfig, numbers, numbers),
    **dict.fromkeys(
        ("decode", "decode_varlen"),
        st.builds(
            DecodeConfig, numbers, numbers, numbers, st.sampled_from(["none", "last", "kernel"]), numbers, numbers
        ),
    ),
}


@given(places, places)
def test_a_place_survives_json_and_has_one_text(place: Place, other: Place) -> None:
    back = Place.from_flat(json.loads(place.text))
    assert back == place
    assert (back.text, back.digest) == (place.text, place.digest)
    assert (place.text == other.text) == (place == other) == (place.digest == other.digest)


CACHES = ("spec.page_size", "spec.leftpad", "spec.many_queries", "spec.cache_dtype")
# Fields that were added after the first records, and their defaults.
ADDED_FIELDS = {
    **dict.fromkeys(("spec.window", "spec.varlen", *CACHES, "spec.softcap", "spec.batch_invariant"), False),
    "spec.page_size": 0,
    "spec.cache_dtype": "",
    "bucket.window": 0,
}
LATEST = dataclasses.replace(
    PLACE,
    spec=dataclasses.replace(PLACE.spec, window=True, varlen=True),
    bucket=dataclasses.replace(PLACE.bucket, window=1024),
)
PAGED = dataclasses.replace(
    PLACE,
    spec=KernelSpec("decode_varlen", 64, "bf16", page_size=16, leftpad=True, multi_token=True, cache_dtype="e4m3"),
)
CAPPED = dataclasses.replace(PLACE, spec=dataclasses.replace(PLACE.spec, softcap=True))
INVARIANT = dataclasses.replace(PLACE, spec=dataclasses.replace(PLACE.spec, batch_invariant=True))
PARTS = {"spec": PLACE.spec.flat(), "bucket": vars(PLACE.bucket)}
NAMES = ["gpu", *(f"{part}.{name}" for part, values in PARTS.items() for name in values)]


def test_every_field_counts() -> None:
    """A field added to a part of a place must be in its text, or two different places would share results."""
    fields = {NAMES_IN_RECORDS.get(f.name, f.name) for f in dataclasses.fields(KernelSpec)}
    assert set(PLACE.spec.flat()) == fields | {"ragged"}  # in records `ragged` says which decode it is
    newest = ("spec.softcap", "spec.batch_invariant")
    assert list(LATEST.flat()) == [name for name in NAMES if name not in (*CACHES, *newest)]
    assert list(CAPPED.flat()) == [name for name in NAMES if name not in ADDED_FIELDS or name == "spec.softcap"]
    assert list(INVARIANT.flat()) == [*list(PLACE.flat())[:8], newest[1], *list(PLACE.flat())[8:]]
    assert list(PAGED.flat()) == [name for name in NAMES if name not in ADDED_FIELDS or name in CACHES]
    assert list(PLACE.flat()) == [name for name in NAMES if name not in ADDED_FIELDS]
    assert len(PAGED.order) == len(LATEST.order) == len(PLACE.order) == len(NAMES)


@given(places)
def test_only_added_fields_at_their_default_are_omitted(place: Place) -> None:
    flat, all_fields = place.flat(), dict(zip(NAMES, place.order, strict=True))
    assert {name: value for name, value in all_fields.items() if name in flat} == flat
    assert {name for name in all_fields if name not in flat} == {
        n for n, default in ADDED_FIELDS.items() if all_fields[n] == default
    }


def test_the_digest_is_stable() -> None:
    """If a digest changes, shared claims and sweep files do not match any more: change it only on purpose."""
    assert PLACE.digest == "8138ee0510583c6cc4663c87159ccf60"
    assert LATEST.digest == "561560cebb4251a71379a913ae096de0"


# A record older than fingerprints, windows, packed sequences and chunked heads.
EARLIER = """{
    "key": {
        "gpu": "h200", "spec.op": "forward", "spec.head_dim": 128, "spec.dtype": "bf16", "spec.group": 4,
        "spec.causal": true, "spec.stats": false, "spec.ragged": false,
        "bucket.kv_rows": 8, "bucket.seqlen_q": 4096, "bucket.seqlen_kv": 4096,
        "environment.templates": "abc123", "environment.triton": "3.5", "environment.protocol": 1
    },
    "config": {"BLOCK_M": 128, "BLOCK_N": 64, "GROUP_HEADS": 0, "num_warps": 8, "num_stages": 3},
    "outcome": "ok",
    "shape": {"batch": 1, "heads": 32, "kv_heads": 8, "seqlen_q": 4096, "seqlen_kv": 4096},
    "time_us": 100.0, "time_us_p20": 99.0, "time_us_p80": 101.0, "error": 0.0023, "registers": 168, "spills": 0,
    "shared_bytes": 98304, "compile_s": 0.7, "detail": "", "created_at": "2026-01-01T00:00:00+00:00", "source": ""
}"""


def earlier(**environment: object) -> dict[str, object]:
    """EARLIER with changed fields of its environment."""
    data = json.loads(EARLIER)
    return data | {"key": data["key"] | {f"environment.{name}": value for name, value in environment.items()}}


def test_records_older_than_fingerprints_are_read() -> None:
    """The hash of their templates identifies their kernel."""
    actual = Result.from_dict(earlier())
    assert actual.place == PLACE
    assert (actual.config, actual.shape, actual.time_us, actual.registers) == (config(), SHAPE, 100.0, 168)
    assert actual.evidence == Evidence("", "", "3.5", "", 1, templates="abc123")
    assert Result.from_dict(json.loads(json.dumps(actual.to_dict()))) == actual
    later = Result.from_dict(earlier(cuda="12.8/12.9", space=1))
    assert later.evidence == dataclasses.replace(actual.evidence, cuda="12.8/12.9")
    assert later.identity != actual.identity


@pytest.mark.parametrize(
    "environment", [{"space": 2}, {"color": 1}, {"templates": ""}, {"templates": None}, {"triton": 3.5}, {"cuda": 12}]
)
def test_unknown_environments_are_refused(environment: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        Result.from_dict(earlier(**environment))


def test_evidence_identity_ignores_only_the_text() -> None:
    """All evidence except the text: a reformatted kernel is the same kernel."""
    stored = result()
    for name, value in {"kernel": "1" * 32, "triton": "3.5.2", "cuda": "13.0", "protocol": 2, "templates": "a"}.items():
        other = dataclasses.replace(stored, evidence=dataclasses.replace(EVIDENCE, **{name: value}))
        assert other.identity != stored.identity, name
    assert dataclasses.replace(stored, evidence=dataclasses.replace(EVIDENCE, text="")).identity == stored.identity
    assert "templates" not in stored.to_dict()["evidence"]


CONFIG_OF = {
    **{op: kind(128, 64, 1, 8, 3) for op, kind in TILED.items()},
    "preprocess": PreprocessConfig(32, 4),
    **dict.fromkeys(("decode", "decode_varlen"), DecodeConfig(64, 8, 4, "last", 4, 2)),
}


@given(places, places)
def test_places_sort_field_by_field_with_omitted_fields(one: Place, other: Place) -> None:
    rows = [result(place=place, config=CONFIG_OF[place.spec.op]) for place in (one, other, one)]
    first, second, third = sorted(rows, key=reading_order)
    assert second.place in (first.place, third.place)  # rows of a place stay adjacent
    fields = [row.place.order for row in (first, second, third)]
    assert fields == sorted(fields)


def test_places_with_different_omitted_fields_sort() -> None:
    spec = dataclasses.replace(PLACE.spec, window=True)
    windowed = dataclasses.replace(PLACE, spec=spec, bucket=Bucket(128, 128, 128))
    plain = dataclasses.replace(PLACE, bucket=Bucket(1, 128, 128))
    rows = [result(place=place) for place in (windowed, plain)]
    assert sorted(rows, key=reading_order) == rows[::-1]


@pytest.mark.parametrize("name", [*PLACE.flat()], ids="without {}".format)
def test_missing_field_is_refused(name: str) -> None:
    flat = PLACE.flat()
    del flat[name]
    with pytest.raises(ArgumentError):
        Place.from_flat(flat)


@pytest.mark.parametrize("name", ["spec.color", "bucket.color", "environment.color", "color.of", "color"])
def test_unknown_field_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError):
        Place.from_flat({**PLACE.flat(), name: 1})


@pytest.mark.parametrize("op", OPS)
@given(st.data())
def test_config_survives_json(op: str, data: st.DataObject) -> None:
    config = data.draw(configs[op])
    text = config_to_json(config)
    assert config_from_dict(op, json.loads(text)) == config
    assert config_to_json(config_from_dict(op, dict(reversed(config_to_dict(config).items())))) == text


@pytest.mark.parametrize("op", TILED)
def test_the_native_head_dim_layout_is_omitted_as_in_earlier_records(op: str) -> None:
    earlier = {"BLOCK_M": 128, "BLOCK_N": 64, "GROUP_HEADS": 0, "num_warps": 8, "num_stages": 3}
    whole = TILED[op](128, 64, 0, 8, 3)
    assert config_from_dict(op, earlier) == whole == TILED[op](128, 64, 0, 8, 3, "native")
    assert config_to_json(whole) == json.dumps(earlier, sort_keys=True)
    assert config_to_dict(TILED[op](128, 64, 0, 8, 3, "chunked")) == earlier | {"HEAD_DIM_LAYOUT": "chunked"}
    assert config_from_dict(op, earlier | {"HEAD_DIM_LAYOUT": "chunked"}) == TILED[op](128, 64, 0, 8, 3, "chunked")


@pytest.mark.parametrize(
    "change", [{"BLOCK_M": "128"}, {"BLOCK_M": True}, {"BLOCK_M": 128.0}, {"color": 1}, {"HEAD_DIM_LAYOUT": 1}]
)
def test_a_config_with_wrong_fields_is_refused(change: dict[str, object]) -> None:
    data = {"BLOCK_M": 128, "BLOCK_N": 64, "GROUP_HEADS": 0, "num_warps": 8, "num_stages": 3}
    with pytest.raises(ConfigError):
        config_from_dict("forward", data | change)


def test_config_errors_name_the_op_as_records_do() -> None:
    data = {"BLOCK_H": 8, "BLOCK_N": 64, "NUM_SPLITS": "8", "merge": "last", "num_warps": 4, "num_stages": 3}
    with pytest.raises(ConfigError, match=r"^decode config field NUM_SPLITS is '8'"):
        config_from_dict("decode_varlen", data)


FORWARD = KernelSpec("forward", 64, "bf16", group=4, causal=True, window=True)


@pytest.mark.parametrize(
    ("spec", "layouts"),
    [(FORWARD, {"stats", "varlen"}), (PAGED.spec, {"stats", "varlen", "page_size", "leftpad"})],
    ids=["forward", "decode"],
)
def test_batch_invariant_calls_share_one_place(spec: KernelSpec, layouts: set[str]) -> None:
    """Whatever their sizes, how sequences lie in memory, and which results are asked for."""
    changed = [dataclasses.replace(spec, **{name: 0 if name == "page_size" else True}) for name in layouts]
    calls = [dataclasses.replace(each, batch_invariant=True) for each in (spec, *changed)]
    window = 700 * spec.window
    shapes = [Shape(1, 4, 4, 9, 9, window), Shape(300, 8, 8, 1000, 9000, 3 * window)]
    (place,) = {place_of("h200", call, sizes) for call in calls for sizes in (*shapes, bucket_of(shapes[1]))}
    assert place.spec.batch_invariant == spec.per_sequence_lengths  # in training the kernels are the usual ones
    differ = [dataclasses.replace(calls[0], head_dim=256), dataclasses.replace(calls[0], group=5)]
    assert place not in {place_of("h200", call, shapes[0]) for call in differ}
    assert place_of("h200", spec, shapes[1]) == Place("h200", spec, bucket_of(shapes[1]))
