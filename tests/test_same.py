"""What a refactoring must not change: kernels, configs, names, which records count, and reading old files.

The answers in tests/data/same are stored; same_samples.py says how they are computed, and how to write them anew if
they change on purpose.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import same_questions as questions
import same_samples as same
from click.testing import CliRunner

SHOWN_DIFFERENCES = 5  # at most this many differing lines are shown

RESULTS = same.FOLDER / "results.jsonl"


def difference(topic: str, before: questions.Json, now: questions.Json) -> list[str]:
    """The differences between two answers, field by field where both have fields."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return [line for name in names for line in difference(f"{topic}.{name}", before.get(name), now.get(name))]
    return [f"  {topic} was {questions.text(before)}", f"  {topic} is  {questions.text(now)}"]


def test_a_difference_names_what_differs() -> None:
    assert difference("a", {"b": 1, "c": {"d": [2], "e": 3}}, {"b": 1, "c": {"d": [4], "e": 3}}) == [
        "  a.c.d was [2]",
        "  a.c.d is  [4]",
    ]


@pytest.mark.parametrize("topic", same.TOPICS)
def test_answers_are_the_same(topic: str) -> None:
    _, answer = same.TOPICS[topic]
    lines, wrong = same.lines_of(topic), []
    for question, before in lines:
        now = answer(question)
        if questions.text(now) != questions.text(before):  # the order of fields matters
            message = difference(topic, before, json.loads(questions.text(now))) or [
                f"  the order of fields: {questions.text(now)}"
            ]
            wrong.append("\n".join([questions.text(question), *message]))
    shown = "\n".join(wrong[:SHOWN_DIFFERENCES])
    assert not wrong, f"{len(wrong)} of {len(lines)} answers differ, such as\n{shown}"


@pytest.mark.parametrize("topic", ["kernels", "configs", "places"])
def test_every_kind_and_flag_is_asked_for(topic: str) -> None:
    result: dict[str, set[str]] = {}
    for (_, stored, *_), _ in same.lines_of(topic):
        result.setdefault("ragged" if stored.get("ragged") else stored["op"], set()).update(stored)
    of_tiles = {"causal", "window", "varlen"}
    expected = {"forward": of_tiles | {"stats"}, "preprocess": {"varlen"}, "dkdv": of_tiles, "dqdr": of_tiles}
    expected |= {"decode": set(), "ragged": set(questions.ORDER)}
    assert set(result) == set(expected)
    assert {kind: flags & set(questions.ORDER) for kind, flags in result.items()} == expected


def test_an_export_has_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whichever order the results were recorded."""
    expected = RESULTS.read_bytes().splitlines(keepends=True)
    path = tmp_path / "tuning.db"
    monkeypatch.setenv("PARALLAX_GEN_DB", str(path))
    with same.Store(path) as store:
        for line in sorted(expected, key=lambda line: questions.by_chance(line.decode())):
            store.save(same.from_line(line))
    assert exported() == expected
    of_decode = [line for line in expected if b'"gpu": "h100"' in line and b'"spec.op": "decode"' in line]
    measured = [line for line in of_decode if b'"outcome": "ok"' in line]
    assert exported("--gpu", "h100", "--op", "decode") == of_decode
    assert exported("--gpu", "h100", "--op", "decode", "--measured") == measured
    assert len(expected) > len(of_decode) > len(measured) > 0


def exported(*arguments: str) -> list[bytes]:
    done = CliRunner().invoke(same.command, ["db", "export", "-", *arguments])
    assert done.exit_code == 0, done.stderr
    return done.stdout_bytes.splitlines(keepends=True)


def test_lines_of_431f796_are_read() -> None:
    """With the same content in today's form. Their kernels are no longer rendered."""
    expected = same.lines_of("of_431f796_today")
    assert len(expected) == 19
    assert [questions.text([*line]) for line in same.of_before()] == [questions.text([*line]) for line in expected]
    assert {counts for counts, _ in expected} == {False}


def test_a_database_of_431f796_is_read(tmp_path: Path) -> None:
    """Like its lines: first read-only, which changes nothing, then for writing."""
    path = tmp_path / "tuning.db"
    shutil.copy(same.FOLDER / "of_431f796.db", path)
    before = path.read_bytes()
    expected = sorted(questions.text(result) for _, result in same.lines_of("of_431f796_today"))
    with same.Store(path, read_only=True) as store:
        assert sorted(questions.text(result.to_dict()) for result in store.all()) == expected
    assert path.read_bytes() == before
    with same.Store(path) as store:
        assert sorted(questions.text(result.to_dict()) for result in store.all()) == expected
        assert (store.problems(), store.unreadable) == ([], 0)


@pytest.mark.slow
def test_all_shipped_records_are_the_same() -> None:
    """Kernels, which records count, the configs of calls and the seed configs of tunes. Takes a minute."""
    expected = json.loads((same.FOLDER / "of_all.json").read_text(encoding="utf-8"))
    if expected.pop("shipped") != same.shipped_now():
        pytest.skip(
            "other records ship since: python tests/same_samples.py --write of_all, before what is to be proved"
        )
    now = same.of_all()
    assert now == expected, "\n".join(difference("all", expected, now))
