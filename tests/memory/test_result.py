"""A result validates itself, and decides which of two results supersedes the other."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_samples import EVIDENCE, PLACE, SHAPE, config, result

from parallax_gen.errors import ArgumentError, ConfigError, ParallaxGenError
from parallax_gen.memory.bounds import truncated_detail
from parallax_gen.memory.result import Evidence, Outcome, Result, supersedes
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.problem.shapes import Bucket

GOOD = result(shape=SHAPE).to_dict()
DEEP: list[Any] = json.loads("[" * 900 + "]" * 900)


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
        {"trial": 0},
        {"trial": True},
        {"trial": 2**31},
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
def test_a_result_is_validated(wrong: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        result(**({"outcome": "ok"} | wrong))  # type: ignore[arg-type]


# Invalid values in a line of JSON, and the field that the error must name.
NONSENSE: list[tuple[str, str | None, object, str]] = [
    *(("time_us", None, value, "time_us") for value in (1e-320, 1e308, math.inf, math.nan, -1.0, 10**400, True, "1")),
    *((name, None, 1e-320, name) for name in ("time_us_p20", "time_us_p80")),
    *(("compile_s", None, value, "compile_s") for value in (1e10, 2**70, math.inf)),
    *(("error", None, value, "error") for value in (10**300, math.nan, False)),
    *((name, None, value, name) for name in ("registers", "spills", "shared_bytes") for value in (2**31, 1.0, True)),
    *(("shape", "batch", value, "batch") for value in (2**2000, 2**62 + 1, 1.0, True)),
    *(("place", f"bucket.{name}", 2**2000, name) for name in ("kv_rows", "seqlen_q", "seqlen_kv")),
    ("place", "spec.group", 2**70, "group"),
    ("place", "spec.page_size", 2**70, "page_size"),
    ("evidence", "protocol", 2**63, "protocol"),
    ("evidence", "protocol", -1, "protocol"),
    ("config", "BLOCK_M", 2**70, "BLOCK_M"),
    ("config", "BLOCK_M", -128, "BLOCK_M"),
    ("config", "SOFTMAX", "\ud800", "SOFTMAX"),
    ("config", "SOFTMAX", "x" * 1000, "SOFTMAX"),
    *((name, None, "a\ud800", name) for name in ("detail", "source", "created_at")),
    *(("evidence", name, "\udfff", name) for name in ("kernel", "text", "triton", "cuda")),
    *(("place", "gpu", name, "gpu") for name in ("\ud800", "a\0", "../../h200", "", "a" * 101)),
    ("detail", None, "x" * 1_000_000, "detail"),
    ("source", None, "here\n## another.py", "source"),
    ("source", None, "x" * 1000, "source"),
    *(("created_at", None, f"{day}T00:00:00+00:00", "created_at") for day in ("2026-02-30", "0000-01-01", "20260101")),
    *((part, name, DEEP, name or part) for part, name in (("detail", None), ("place", "x"), ("evidence", "x"))),
    *((name, None, DEEP, name) for name in ("place", "evidence", "config", "shape")),
]


@pytest.mark.parametrize(("part", "name", "value", "message"), NONSENSE)
def test_invalid_values_are_refused_with_the_name_of_their_field(
    part: str, name: str | None, value: object, message: str
) -> None:
    data = GOOD | {part: value if name is None else GOOD[part] | {name: value}}
    with pytest.raises((ArgumentError, ConfigError)) as raised:
        Result.from_dict(data)
    text = str(raised.value)
    text.encode()  # it must be printable
    assert message in text
    assert len(text) < 500


@pytest.mark.parametrize(
    "change",
    [
        *({"time_us": value} for value in (1, 0.001, 1e12)),
        *({"error": value} for value in (0, 1e300, math.inf)),
        {"time_us": 5.0, "time_us_p20": 7.0, "time_us_p80": 6.0},
        {"registers": 2**31 - 1, "compile_s": 0},
        {"detail": "line 1\nligne 2: \N{SNOWMAN}" + "x" * 40_000},
        {"created_at": "2026-01-01T00:00:00.123456+00:00"},
    ],
)
def test_plausible_values_are_accepted(change: dict[str, object]) -> None:
    assert Result.from_dict(GOOD | change).to_dict() == GOOD | change


def test_long_compiler_messages_are_truncated() -> None:
    message = "\udc80 " + "x" * 1_000_000
    detail = truncated_detail(message)
    assert result("compile", detail=detail).detail.startswith("\\udc80 xxx")


def test_long_texts_are_searched_quickly() -> None:
    """The search for machine faults is quadratic in the searched length, which is limited."""
    started = time.monotonic()
    assert not result("crash", detail="CUDA " * 10_000).is_machine_fault
    assert result("crash", detail="OSError: " + "x" * 40_000).is_machine_fault
    assert result("crash", detail="x" * 40_000 + "\nNo space left on device").is_machine_fault
    assert time.monotonic() - started < 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
# Fields that were added after the first records, omitted at these values.
ADDED_FIELDS = {
    ("place", "spec.window"): False,
    ("place", "spec.varlen"): False,
    ("place", "bucket.window"): 0,
    ("shape", "window"): 0,
    ("config", "HEAD_DIM_LAYOUT"): "native",
}
PLACES = [(name, None) for name in GOOD] + [
    (p, name) for p in ("place", "evidence", "config", "shape") for name in GOOD[p]
]
likely = st.sampled_from([False, True, 0, 1, 128, "", "native", "chunked"])


@given(st.sampled_from([*PLACES, *ADDED_FIELDS]), json_values | likely)
def test_any_value_in_any_field_is_accepted_or_refused(place: tuple[str, str | None], value: object) -> None:
    part, name = place
    data = GOOD | {part: value if name is None else GOOD[part] | {name: value}}
    try:
        back = Result.from_dict(data)
    except (ParallaxGenError, ValueError):
        assert json.dumps(data) != json.dumps(GOOD)
    else:
        written = GOOD if place in ADDED_FIELDS and value == ADDED_FIELDS[place] else data
        assert back.to_dict() == written
        assert json.dumps(Result.from_dict(written).to_dict()) == json.dumps(back.to_dict())


@pytest.mark.parametrize("name", [name for part, name in ADDED_FIELDS if part == "place"])
def test_a_place_has_one_text(name: str) -> None:
    data = GOOD | {"place": GOOD["place"] | {name: ADDED_FIELDS["place", name]}}
    with pytest.raises(ArgumentError, match="only the fields"):
        Result.from_dict(data)


def test_a_result_with_a_window_round_trips() -> None:
    spec = dataclasses.replace(PLACE.spec, window=True, varlen=True)
    place = dataclasses.replace(PLACE, spec=spec, bucket=Bucket(8, 4096, 4096, 1024))
    shape = dataclasses.replace(SHAPE, window=1000)
    sent = result(place=place, shape=shape, config=dataclasses.replace(config(), HEAD_DIM_LAYOUT="chunked"))
    data = json.loads(json.dumps(sent.to_dict()))
    assert Result.from_dict(data) == sent
    assert (data["place"]["spec.window"], data["place"]["spec.varlen"]) == (True, True)
    assert (data["place"]["bucket.window"], data["shape"]["window"]) == (1024, 1000)
    assert data["config"]["HEAD_DIM_LAYOUT"] == "chunked"


def test_a_trial_number_is_written_if_there_is_one() -> None:
    """A record without one has the text that it had before the field, which earlier versions read."""
    assert "trial" not in result().to_dict()
    numbered = json.loads(json.dumps(result(trial=7).to_dict()))
    assert numbered.pop("trial") == 7
    assert numbered == result().to_dict()
    assert Result.from_dict(numbered | {"trial": 7}).trial == 7
    assert Result.from_dict(numbered).trial is None
    with pytest.raises(ArgumentError, match="trial"):
        Result.from_dict(numbered | {"trial": "7"})


def test_superseding_does_not_depend_on_order() -> None:
    rows = [result(outcome, day=day) for day, outcome in enumerate(Outcome, start=1)]
    for one in rows:
        for other in rows:
            assert one is other or supersedes(one, other) != supersedes(other, one)


def test_outcomes_are_strings() -> None:
    for outcome in Outcome:
        assert f"{outcome} {outcome:>9}" == f"{outcome.value} {outcome.value:>9}"
        assert json.dumps({outcome: outcome}) == json.dumps({outcome.value: outcome.value})
        assert {outcome.value: 1}[outcome] == 1
        assert result(outcome.value).outcome is outcome
        assert outcome.meaning


def test_properties_of_outcomes() -> None:
    def those(what: str) -> list[str]:
        return [outcome.value for outcome in Outcome if getattr(outcome, what)]

    assert those("timed") == ["ok", "slow"]
    assert those("has_time") == ["ok", "slow", "predicted"]
    assert those("failed") == ["invalid", "compile", "resources", "timeout", "crash", "wrong", "slow"]
    assert those("tried") == ["ok", "invalid", "compile", "resources", "timeout", "crash", "wrong", "slow"]
    assert those("inconclusive") == ["timeout", "crash"]
    full = "OSError: [Errno 28] No space left on device"
    assert [outcome for outcome in Outcome if result(outcome, detail=full).is_machine_fault] == [
        "compile",
        "resources",
        "crash",
    ]
