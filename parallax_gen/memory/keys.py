"""What a tuning result is true of: a frozen key, in clear and hashed, that can say how it differs from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import metadata
from typing import Any

from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec

Scalar = str | int | bool

# Version of the timing protocol (tuning/measure.py says what it is): times of two protocols are not compared.
PROTOCOL = 1


@dataclass(frozen=True)
class Environment:
    """What else a time depends on. A row from another environment is kept, and not used.

    templates  hash of the op's template and all it includes, comments aside
    triton     its major.minor version, which is what its code generation changes with
    protocol   version of the timing protocol
    """

    templates: str
    triton: str
    protocol: int


@dataclass(frozen=True)
class Key:
    """Every field that a measured time depends on.

    Left out, and why: the exact sizes (a bucket is tuned at its representative shape), torch's version (it
    allocates and launches, but compiles nothing), CUDA's (ptxas comes with Triton).
    """

    gpu: str
    spec: KernelSpec
    bucket: Bucket
    environment: Environment

    def flat(self) -> dict[str, Scalar]:
        """Every field in clear, as `gpu`, `spec.op`, `bucket.seqlen_kv`, `environment.triton`, ...

        Those that came after records were first written only where they are not at their default: older records
        keep their text and their digest.
        """
        return self._flat(self.spec.to_dict(), self.bucket.to_dict())

    def every_field(self) -> dict[str, Scalar]:
        """As `flat`, with no field left out: the same fields in the same order for every key, to sort keys by."""
        return self._flat(asdict(self.spec), asdict(self.bucket))

    def _flat(self, spec: dict[str, Any], bucket: dict[str, Any]) -> dict[str, Scalar]:
        flat: dict[str, Scalar] = {"gpu": self.gpu}
        for part, values in (("spec", spec), ("bucket", bucket), ("environment", asdict(self.environment))):
            flat.update({f"{part}.{name}": value for name, value in values.items()})
        return flat

    @property
    def digest(self) -> str:
        """32 hex digits of the SHA-256 of the fields in clear."""
        text = json.dumps(self.flat(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def diff(self, other: Key) -> dict[str, tuple[Scalar | None, Scalar | None]]:
        """The fields that differ: name -> (mine, the other's), None for one that `flat` leaves out."""
        mine, theirs = self.flat(), other.flat()
        names = [*mine, *(name for name in theirs if name not in mine)]
        return {n: (mine.get(n), theirs.get(n)) for n in names if mine.get(n) != theirs.get(n)}

    @classmethod
    def here(cls, gpu: str, spec: KernelSpec, bucket: Bucket, templates: str) -> Key:
        """The key under which results count in this process: with the Triton that is installed."""
        return cls(gpu, spec, bucket, Environment(templates, triton_version(), PROTOCOL))

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Key:
        """The key that `flat` wrote. Raises ArgumentError or KeyError on fields that are not a key's."""
        parts: dict[str, dict[str, Any]] = {"spec": {}, "bucket": {}, "environment": {}}
        for name, value in flat.items():
            part, dot, field = name.partition(".")
            if dot:
                parts[part][field] = value
        if set(parts["environment"]) != {f.name for f in fields(Environment)}:
            raise KeyError(f"environment has the fields {sorted(parts['environment'])}")
        return cls(
            gpu=flat["gpu"],
            spec=KernelSpec.from_dict(parts["spec"]),
            bucket=Bucket.from_dict(parts["bucket"]),
            environment=Environment(**parts["environment"]),
        )


@cache
def triton_version() -> str:
    """major.minor of the installed Triton, read without importing it where it was installed under its name."""
    try:
        full = metadata.version("triton")
    except metadata.PackageNotFoundError:  # a build of torch's or a vendor's own
        import triton

        full = str(triton.__version__)
    return ".".join(full.split(".")[:2])
