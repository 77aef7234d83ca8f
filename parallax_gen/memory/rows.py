"""A result as a row of the tuning database."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

from parallax_gen.errors import ArgumentError
from parallax_gen.memory.bounds import check_flat, shown
from parallax_gen.memory.place import Place, Scalar
from parallax_gen.memory.result import Evidence, Result

IDENTITY = ("place_json", "config_json", "kernel", "templates", "triton", "cuda", "protocol")  # `Result.identity`

_PLAIN = [f.name for f in fields(Result) if f.name not in ("place", "evidence", "config", "shape", "trial")]
_EVIDENCE = [f.name for f in fields(Evidence)]


def identity_of(result: Result) -> dict[str, Scalar]:
    """The columns that identify a result's row."""
    return dict(zip(IDENTITY, result.identity, strict=True))


def to_row(result: Result) -> dict[str, object]:
    """The columns of a result's row."""
    data = result.to_dict()
    return {
        **identity_of(result),
        "gpu": result.place.gpu,
        "op": result.place.spec.public_op,
        "text": result.evidence.text,
        "shape_json": data["shape"] and json.dumps(data["shape"]),
        **{name: data[name] for name in _PLAIN},
        "trial": result.trial,
    }


def from_row(row: Mapping[str, Any]) -> Result:
    """The inverse of `to_row`. Raises one of MALFORMED, or KeyError for a missing column, on anything else.

    A read-only database of an earlier schema has no column `trial`.
    """
    data: dict[str, Any] = {name: row[name] for name in _PLAIN} | {"trial": row.get("trial")}
    data["place"] = _place_from(_text("place_json", row["place_json"]))
    data["evidence"] = {name: row[name] for name in _EVIDENCE if name != "templates" or row[name]}
    for name in ("config", "shape"):
        text = row[f"{name}_json"]
        data[name] = None if text is None else json.loads(_text(f"{name}_json", text))
    result = Result.from_dict(data)
    if (result.place.gpu, result.place.spec.public_op) != (row["gpu"], row["op"]):
        raise ArgumentError("gpu and op", (row["gpu"], row["op"]), "those of the place")
    return result


def _text(name: str, value: object) -> str:
    """A column's text. In an untrusted file the value may be of any SQLite type."""
    if not isinstance(value, str):
        raise ArgumentError(name, shown(value), "text")
    return value


@lru_cache(maxsize=1024)
def _place_from(text: str) -> Place:
    """Parse a place, cached: many rows have the same place, and a place has many fields."""
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ArgumentError("place", shown(data), "an object of its fields")
    check_flat("place", data)
    return Place.from_flat(data)
