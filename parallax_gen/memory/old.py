"""Reads the formats of all earlier versions: names of ops and config fields, records from before fingerprints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from parallax_gen.errors import ArgumentError, ConfigError
from parallax_gen.memory.bounds import check_flat, shown
from parallax_gen.ops.base import KernelConfig, config_from_dict
from parallax_gen.problem.spec import ADDED_FIELDS, NAMES_IN_RECORDS, OPS, PUBLIC_OPS, KernelSpec, public_op_of

# The names of KernelSpec that differ in records: `ragged` with decode means decode_varlen, `many_queries` multi_token.

# (the public op, the flag `ragged`) -> op.
OPS_OF_RECORDS = {(public_op_of(op), op not in PUBLIC_OPS): op for op in OPS}

MAX_IN_RECORDS = {"group": 2**16, "page_size": 2**31}  # records may come from untrusted files

_FIELD_OF = {stored: field for field, stored in NAMES_IN_RECORDS.items()}
_FIELDS = set(KernelSpec("forward", 128, "bf16").flat())


def op_of_record(name: object, ragged: object) -> str:
    """The op that a record's name of it and the flag `ragged` mean. Raises ArgumentError."""
    if type(ragged) is not bool:
        raise ArgumentError("ragged", shown(ragged), "True or False")
    if name not in PUBLIC_OPS or not isinstance(name, str):
        raise ArgumentError("op", shown(name), ", ".join(PUBLIC_OPS))
    if (name, ragged) not in OPS_OF_RECORDS:
        allowed = " or ".join(op for op, with_lengths in OPS_OF_RECORDS if with_lengths)
        raise ArgumentError("ragged", f"True with op {name!r}", f"True only with op {allowed}")
    return OPS_OF_RECORDS[name, ragged]


def spec_of_record(name: object, ragged: object, **fields: Any) -> KernelSpec:
    """The spec in a record. name: of the op. fields: the others, by their names in records. Raises ArgumentError."""
    op = op_of_record(name, ragged)
    try:
        return KernelSpec(op, **{_FIELD_OF.get(stored, stored): value for stored, value in fields.items()})
    except ArgumentError as error:
        raise ArgumentError(NAMES_IN_RECORDS.get(error.argument, error.argument), error.got, error.allowed) from error


def spec_from(data: Mapping[str, Any]) -> KernelSpec:
    """The inverse of `KernelSpec.to_dict`. Raises ArgumentError on unknown or missing fields, and on huge numbers."""
    if not _FIELDS - set(ADDED_FIELDS) <= set(data) <= _FIELDS:
        raise ArgumentError("spec", sorted(data), f"the fields {sorted(_FIELDS)}")
    fields = {name: value for name, value in data.items() if name not in ("op", "ragged")}
    spec = spec_of_record(data["op"], data["ragged"], **fields)
    for name, largest in MAX_IN_RECORDS.items():
        if getattr(spec, name) > largest:
            raise ArgumentError(name, f"{getattr(spec, name)!r:.80}", f"at most {largest}")
    return spec


# -- Configs with the earlier names of fields and values.

TODAYS_NAMES = {
    "HEAD_GROUP": "GROUP_HEADS",
    "HEAD_DIM_AS": "HEAD_DIM_LAYOUT",
    "ROW_MAX": "SOFTMAX",
    "ROW_NUMBERS": "ROW_STATS",
}
# Today's name of a field -> the earlier names of its values -> today's.
TODAYS_VALUES: dict[str, dict[object, str]] = {
    "HEAD_DIM_LAYOUT": {"whole": "native", "pieces": "chunked", "halves": "split"},
    "SOFTMAX": {"running": "online", "first": "fixed_reference"},
    "MASK": {"weights": "after_exp", "scores": "before_exp"},
    "ROW_STATS": {"apart": "separate", "together": "fused"},
}


def renamed(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config's fields with today's names and values. Raises ConfigError if a field has both of its names."""
    fields: dict[str, Any] = {}
    for old, value in data.items():
        name = TODAYS_NAMES.get(old, old)
        if name in fields:
            raise ConfigError(f"a config has {name} twice: under an earlier name and under today's")
        fields[name] = TODAYS_VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
    return fields


def config_of_record(op: str, data: Mapping[str, Any]) -> KernelConfig:
    """The config in a record, a sweep or a command, with today's names or earlier ones. Raises ConfigError."""
    return config_from_dict(op, renamed(data))


def renamed_json(text: object) -> Any:
    """A stored config's JSON with today's names, as `config_to_json` writes it. Returns anything else unchanged."""
    try:
        data = json.loads(text) if isinstance(text, str) else None
        return json.dumps(renamed(data), sort_keys=True) if isinstance(data, dict) else text
    except (ValueError, RecursionError, ConfigError):
        return text


# -- Records from before fingerprints. Today's templates render none of their programs: they are hints for tuning.

# The fields of a record's environment before fingerprints; "cuda" and "space" were added later.
_ENVIRONMENT = {"templates", "triton", "protocol"}


def upgrade_record(data: dict[str, Any]) -> dict[str, Any]:
    """Convert a record from before fingerprints to today's form: the hash of its templates identifies its kernel.

    `space` was the version of the knobs' meaning; it is 1 in every record.
    """
    key = data["key"]
    if not isinstance(key, dict):
        raise ArgumentError("key", shown(key), "an object of its fields")
    check_flat("key", key)
    prefix = "environment."
    environment = {name.removeprefix(prefix): value for name, value in key.items() if name.startswith(prefix)}
    if not _ENVIRONMENT <= set(environment) <= _ENVIRONMENT | {"cuda", "space"} or environment.get("space", 1) != 1:
        raise ArgumentError("key", shown(key), f"environment.* fields {sorted(_ENVIRONMENT)}, and optionally cuda")
    templates = environment["templates"]
    if not isinstance(templates, str) or not templates:
        raise ArgumentError("environment.templates", shown(templates), "text")
    evidence = {
        "kernel": "",
        "text": "",
        "triton": environment["triton"],
        "cuda": environment.get("cuda", ""),
        "protocol": environment["protocol"],
        "templates": templates,
    }
    place = {name: value for name, value in key.items() if not name.startswith(prefix)}
    return {name: value for name, value in data.items() if name != "key"} | {"place": place, "evidence": evidence}
