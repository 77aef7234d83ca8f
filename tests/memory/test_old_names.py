"""Configs whose fields and values had other names: records, databases, studies and command lines keep being read."""

from __future__ import annotations

import json
import sqlite3
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from cli_samples import known_dkdv

from parallax_gen.errors import ConfigError
from parallax_gen.memory.old import FIELDS, config_of_record, renamed_json
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import config_to_dict, config_to_json
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.tuning.claims import SharedClaims

BEFORE = {
    "BLOCK_M": 64,
    "BLOCK_N": 64,
    "HEAD_GROUP": 4,
    "num_warps": 4,
    "num_stages": 3,
    "HEAD_DIM_AS": "pieces",
    "MASK": "scores",
    "ROW_NUMBERS": "together",
}


def test_old_names_of_configs_are_read() -> None:
    config = config_of_record("dkdv", BEFORE)
    assert config == DkDvConfig(64, 64, 4, 4, 3, "chunked", MASK="before_exp", ROW_STATS="fused")
    assert config_of_record("dkdv", config_to_dict(config)) == config
    assert renamed_json(json.dumps(BEFORE)) == config_to_json(config)
    assert renamed_json(config_to_json(config)) == config_to_json(config)
    forward = {name: value for name, value in BEFORE.items() if name not in ("MASK", "ROW_NUMBERS")}
    for old, softmax in ((None, "online"), ("running", "online"), ("first", "fixed_reference")):
        data = forward | ({} if old is None else {"ROW_MAX": old})
        assert getattr(config_of_record("forward", data), "SOFTMAX") == softmax  # noqa: B009 - of any config


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"HEAD_GROUP": 1, "GROUP_HEADS": 2}', None, 3, b"\xff"])
def test_what_is_no_configs_json_stays_as_it_is(text: object) -> None:
    assert renamed_json(text) is text


def test_a_field_by_both_names_is_refused() -> None:
    with pytest.raises(ConfigError, match="a config has GROUP_HEADS twice"):
        config_of_record("dkdv", BEFORE | {"GROUP_HEADS": 4})


def test_a_result_takes_the_place_of_what_an_old_database_has_of_it(tmp_path: Path) -> None:
    """A config's JSON is part of a row's identity: a writer brings it up to date, and a reader changes nothing."""
    path = tmp_path / "tuning.db"
    result = known_dkdv(500.0)
    assert set(FIELDS.values()) & set(config_to_dict(result.config))
    with Store(path) as store:
        store.save(result)
    connection = sqlite3.connect(path)
    text = connection.execute("SELECT config_json FROM measurements").fetchone()[0]
    text = _before(text)
    assert text != config_to_json(result.config)
    connection.execute("UPDATE measurements SET config_json = ?", (text,))
    connection.execute("PRAGMA user_version = 2")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with Store(path, read_only=True) as store:
        assert store.results(result.place) == store.all() == [result]
    assert path.read_bytes() == before
    newer = replace(result, time_us=400.0, created_at="2030-01-01T00:00:00+00:00")
    with Store(path) as store:
        assert store.all() == [result]
        store.save(newer)
        assert store.all() == [newer]


def test_a_config_that_a_worker_of_before_tried_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a study that workers of both versions share."""
    storage = optuna.storages.InMemoryStorage()
    result = known_dkdv(500.0)

    def worker(name: str) -> SharedClaims:
        return SharedClaims(storage, result.place, "program", name, 60.0, nullcontext)

    with monkeypatch.context() as then:
        then.setattr("parallax_gen.tuning.claims.config_to_json", lambda config: _before(config_to_json(config)))
        before = worker("before")
        assert before.claim(result.config)
        before.finish(result)
    (study,) = storage.get_all_studies()
    (trial,) = storage.get_all_trials(study._study_id)
    assert "HEAD_GROUP" in trial.user_attrs["config"]
    now = worker("now")
    assert not now.claim(result.config)
    assert now.claim(replace(result.config, num_warps=2))
    assert now.new_results() == [result]


def _before(text: str) -> str:
    for old, new in FIELDS.items():
        text = text.replace(f'"{new}"', f'"{old}"')
    return text
