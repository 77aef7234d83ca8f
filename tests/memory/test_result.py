"""A result checks itself, whoever wrote it, and knows which of two counts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_samples import EVIDENCE, PLACE, SHAPE, config, result

from parallax_gen.errors import ArgumentError, ParallaxGenError
from parallax_gen.memory.result import OUTCOMES, Evidence, Result, supersedes
from parallax_gen.problem.config import DecodeConfig
from parallax_gen.problem.shapes import Bucket


def evidence(**fields: Any) -> Evidence:
    return dataclasses.replace(EVIDENCE, **fields)


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
        {"evidence": evidence(cuda=12.8)},
        {"evidence": evidence(protocol=True)},
        {"evidence": evidence(protocol="1")},
        {"evidence": evidence(kernel="0123")},
        {"evidence": evidence(kernel="G" * 32)},
        {"evidence": evidence(text=None)},
        {"place": dataclasses.replace(PLACE, gpu=7)},
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
    ("place", "spec.window"): False,
    ("place", "spec.varlen"): False,
    ("place", "bucket.window"): 0,
    ("shape", "window"): 0,
    ("config", "HEAD_DIM_AS"): "whole",
}
PLACES = [(name, None) for name in GOOD] + [
    (p, name) for p in ("place", "evidence", "config", "shape") for name in GOOD[p]
]
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


@pytest.mark.parametrize("name", [name for part, name in LATER if part == "place"])
def test_a_place_has_one_text(name: str) -> None:
    data = GOOD | {"place": GOOD["place"] | {name: LATER["place", name]}}
    with pytest.raises(ArgumentError, match="no fields beside"):
        Result.from_dict(data)


def test_a_result_of_a_window_comes_back() -> None:
    spec = dataclasses.replace(PLACE.spec, window=True, varlen=True)
    place = dataclasses.replace(PLACE, spec=spec, bucket=Bucket(8, 4096, 4096, 1024))
    shape = dataclasses.replace(SHAPE, window=1000)
    sent = result(place=place, shape=shape, config=dataclasses.replace(config(), HEAD_DIM_AS="pieces"))
    data = json.loads(json.dumps(sent.to_dict()))
    assert Result.from_dict(data) == sent
    assert (data["place"]["spec.window"], data["place"]["spec.varlen"]) == (True, True)
    assert (data["place"]["bucket.window"], data["shape"]["window"]) == (1024, 1000)
    assert data["config"]["HEAD_DIM_AS"] == "pieces"


def test_order_of_writing_does_not_matter() -> None:
    rows = [result(outcome, day=day) for day, outcome in enumerate(OUTCOMES, start=1)]
    for one in rows:
        for other in rows:
            assert one is other or supersedes(one, other) != supersedes(other, one)
