"""The key under which calls look up records: GPU, kernel spec and size bucket."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from parallax_gen.errors import ArgumentError
from parallax_gen.memory.bounds import shown
from parallax_gen.memory.old import spec_from
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec

Scalar = str | int | bool


@dataclass(frozen=True)
class Place:
    """One kernel spec in one size bucket on one GPU. The measurements of a place decide which config its calls get.

    gpu  its name in records, such as h200
    """

    gpu: str
    spec: KernelSpec
    bucket: Bucket

    def flat(self) -> dict[str, Scalar]:
        """All fields by dotted name: `gpu`, `spec.op`, `bucket.seqlen_kv`, ...

        Fields that were added after the first records are left out at their default value, so that the text of
        older records stays the same.
        """
        return self._flat(self.spec.to_dict(), self.bucket.to_dict())

    @cached_property
    def text(self) -> str:
        """`flat` as JSON: equal places have equal texts."""
        return json.dumps(self.flat(), separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """32 hex digits of the SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    @cached_property
    def order(self) -> tuple[Scalar, ...]:
        """The values of all fields, defaults included: the sort key of places."""
        return tuple(self._flat(self.spec.flat(), vars(self.bucket)).values())

    def _flat(self, spec: Mapping[str, Any], bucket: Mapping[str, Any]) -> dict[str, Scalar]:
        flat: dict[str, Scalar] = {"gpu": self.gpu}
        flat |= {f"spec.{name}": value for name, value in spec.items()}
        return flat | {f"bucket.{name}": value for name, value in bucket.items()}

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Place:
        """The inverse of `flat`. Raises ArgumentError on anything else."""
        parts: dict[str, dict[str, Any]] = {"spec": {}, "bucket": {}}
        for name, value in flat.items():
            part, dot, field = name.partition(".")
            if dot and part in parts:
                parts[part][field] = value
        if not isinstance(flat.get("gpu"), str):
            raise ArgumentError("gpu", shown(flat.get("gpu")), "text")
        place = cls(flat["gpu"], spec_from(parts["spec"]), Bucket.from_dict(parts["bucket"]))
        if place.flat() != flat:
            raise ArgumentError("place", shown(flat), f"only the fields {list(place.flat())}")
        return place
