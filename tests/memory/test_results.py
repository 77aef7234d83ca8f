"""A result checks itself, whoever wrote it, and knows which of two counts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_samples import SHAPE, result

from parallax_gen.errors import ArgumentError, ParallaxGenError
from parallax_gen.memory.results import OUTCOMES, Result, supersedes
from parallax_gen.problem.config import DecodeConfig


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
PLACES = [(name, None) for name in GOOD] + [(p, name) for p in ("key", "config", "shape") for name in GOOD[p]]


@given(st.sampled_from(PLACES), json_values)
def test_no_value_anywhere_does_more_than_be_refused(place: tuple[str, str | None], value: object) -> None:
    part, name = place
    data = GOOD | {part: value if name is None else GOOD[part] | {name: value}}
    try:
        back = Result.from_dict(data)
    except (ParallaxGenError, ValueError):
        assert json.dumps(data) != json.dumps(GOOD)
    else:
        assert back.to_dict() == data


def test_order_of_writing_does_not_matter() -> None:
    rows = [result(outcome, day=day) for day, outcome in enumerate(OUTCOMES, start=1)]
    for one in rows:
        for other in rows:
            assert one is other or supersedes(one, other) != supersedes(other, one)
