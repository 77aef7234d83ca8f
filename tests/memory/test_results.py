"""A result checks itself, whoever wrote it, and knows which of two counts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_samples import KEY, SHAPE, config, result

from parallax_gen.errors import ArgumentError, ParallaxGenError
from parallax_gen.memory.keys import Key
from parallax_gen.memory.results import OUTCOMES, Result, supersedes
from parallax_gen.problem.config import DecodeConfig
from parallax_gen.problem.shapes import Bucket


def in_environment(**fields: Any) -> Key:
    return dataclasses.replace(KEY, environment=dataclasses.replace(KEY.environment, **fields))


@pytest.mark.parametrize(
    "wrong",
    [
        {"outcome": "great"},
        {"time_us": None},
        {"time_us": 0.0},
        {"time_us": float("nan")},
        {"time_us": True},
        {"error": -1.0},
        {"error": float("nan")},
        {"registers": 1.0},
        {"detail": None},
        {"created_at": "2026-01-01T00:00:00"},
        {"config": DecodeConfig(64, 8, 4, "last", 4, 2)},
        {"key": in_environment(cuda=12.8)},
        {"key": in_environment(space=True)},
        {"key": in_environment(space="1")},
    ],
)
def test_a_result_checks_itself(wrong: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        result(**({"outcome": "ok"} | wrong))  # type: ignore[arg-type]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
GOOD = result(shape=SHAPE).to_dict()
# Fields that came after records were first written: left out at these values.
LATER = {
    ("key", "spec.window"): False,
    ("key", "spec.varlen"): False,
    ("key", "bucket.window"): 0,
    ("key", "environment.cuda"): "",
    ("key", "environment.space"): 1,
    ("shape", "window"): 0,
    ("config", "HEAD_DIM_AS"): "whole",
}
PLACES = [(name, None) for name in GOOD] + [(p, name) for p in ("key", "config", "shape") for name in GOOD[p]]
likely = st.sampled_from([False, True, 0, 1, 128, "", "whole", "pieces"])


@given(st.sampled_from([*PLACES, *LATER]), json_values | likely)
def test_no_value_anywhere_does_more_than_be_refused(place: tuple[str, str | None], value: object) -> None:
    part, name = place
    data = GOOD | {part: value if name is None else GOOD[part] | {name: value}}
    try:
        back = Result.from_dict(data)
    except (ParallaxGenError, ValueError):
        assert json.dumps(data) != json.dumps(GOOD)
    else:
        written = GOOD if place in LATER and value == LATER[place] else data
        assert back.to_dict() == written
        assert json.dumps(Result.from_dict(written).to_dict()) == json.dumps(back.to_dict())


@pytest.mark.parametrize("name", [name for part, name in LATER if part == "key"])
def test_a_key_has_one_text(name: str) -> None:
    data = GOOD | {"key": GOOD["key"] | {name: LATER["key", name]}}
    with pytest.raises(ArgumentError, match="no fields beside"):
        Result.from_dict(data)


def test_a_result_of_a_window_comes_back() -> None:
    key = dataclasses.replace(
        KEY, spec=dataclasses.replace(KEY.spec, window=True, varlen=True), bucket=Bucket(8, 4096, 4096, 1024)
    )
    shape = dataclasses.replace(SHAPE, window=1000)
    sent = result(key=key, shape=shape, config=dataclasses.replace(config(), HEAD_DIM_AS="pieces"))
    data = json.loads(json.dumps(sent.to_dict()))
    assert Result.from_dict(data) == sent
    assert (data["key"]["spec.window"], data["key"]["spec.varlen"]) == (True, True)
    assert (data["key"]["bucket.window"], data["shape"]["window"]) == (1024, 1000)
    assert data["config"]["HEAD_DIM_AS"] == "pieces"


def test_order_of_writing_does_not_matter() -> None:
    rows = [result(outcome, day=day) for day, outcome in enumerate(OUTCOMES, start=1)]
    for one in rows:
        for other in rows:
            assert one is other or supersedes(one, other) != supersedes(other, one)
