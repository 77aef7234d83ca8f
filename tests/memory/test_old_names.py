"""Old names of config fields and values are read in records, databases, studies and command lines."""

from __future__ import annotations

import json
import sqlite3
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from cli_samples import dkdv_record

from parallax_gen.errors import ConfigError
from parallax_gen.memory.old import TODAYS_NAMES, config_of_record, renamed_json
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import config_to_dict, config_to_json
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.tuning.claims import SharedClaims

OLD_NAMES = {
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
    config = config_of_record("dkdv", OLD_NAMES)
    assert config == DkDvConfig(64, 64, 4, 4, 3, "chunked", MASK="before_exp", ROW_STATS="fused")
    assert config_of_record("dkdv", config_to_dict(config)) == config
    assert renamed_json(json.dumps(OLD_NAMES)) == config_to_json(config)
    assert renamed_json(config_to_json(config)) == config_to_json(config)
    forward = {name: value for name, value in OLD_NAMES.items() if name not in ("MASK", "ROW_NUMBERS")}
    for old, softmax in ((None, "online"), ("running", "online"), ("first", "fixed_reference")):
        data = forward | ({} if old is None else {"ROW_MAX": old})
        assert getattr(config_of_record("forward", data), "SOFTMAX") == softmax  # noqa: B009 - of any config


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"HEAD_GROUP": 1, "GROUP_HEADS": 2}', None, 3, b"\xff"])
def test_other_json_is_unchanged(text: object) -> None:
    assert renamed_json(text) is text


def test_a_field_under_both_names_is_refused() -> None:
    with pytest.raises(ConfigError, match="a config has GROUP_HEADS twice"):
        config_of_record("dkdv", OLD_NAMES | {"GROUP_HEADS": 4})


def test_a_result_replaces_its_row_under_old_names(tmp_path: Path) -> None:
    """A config's JSON is part of a row's identity: a writer updates it, and a reader changes nothing."""
    path = tmp_path / "tuning.db"
    result = dkdv_record(500.0)
    assert set(TODAYS_NAMES.values()) & set(config_to_dict(result.config))
    with Store(path) as store:
        store.save(result)
    connection = sqlite3.connect(path)
    text = connection.execute("SELECT config_json FROM measurements").fetchone()[0]
    text = _with_old_names(text)
    assert text != config_to_json(result.config)
    connection.execute("UPDATE measurements SET config_json = ?", (text,))
    connection.execute("ALTER TABLE measurements DROP COLUMN trial")
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


def test_a_config_tried_by_a_tuner_of_an_old_version_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of both versions share a study."""
    storage = optuna.storages.InMemoryStorage()
    result = dkdv_record(500.0)

    def tuner(name: str) -> SharedClaims:
        return SharedClaims(storage, result.place, "program", name, 60.0, nullcontext)

    with monkeypatch.context() as then:
        then.setattr(
            "parallax_gen.tuning.claims.config_to_json", lambda config: _with_old_names(config_to_json(config))
        )
        before = tuner("before")
        assert before.claim(result.config)
        before.finish(result)
    (study,) = storage.get_all_studies()
    (trial,) = storage.get_all_trials(study._study_id)
    assert "HEAD_GROUP" in trial.user_attrs["config"]
    now = tuner("now")
    assert not now.claim(result.config)
    assert now.claim(replace(result.config, num_warps=2))
    assert now.new_results() == [result]


def _with_old_names(text: str) -> str:
    for old, new in TODAYS_NAMES.items():
        text = text.replace(f'"{new}"', f'"{old}"')
    return text
