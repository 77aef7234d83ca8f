"""What a tuning result is true of: a frozen key, in clear and hashed, that can say how it differs from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from parallax_gen.errors import ArgumentError
from parallax_gen.memory.toolchain import cuda_version, triton_version
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec

Scalar = str | int | bool

# Version of the timing protocol (tuning/measure.py says what it is): times of two protocols are not compared.
PROTOCOL = 1

# Version of what the knobs of a config mean (problem/config.py says what). It is raised when the same text of a config
# comes to mean another program by a change outside of the templates, whose hash is a field of its own: in how
# codegen/ reads HEAD_DIM_AS or launches a grid. A further value of a knob, or a further knob that is at its default in
# older configs, does not raise it: every time stands for the program that it was taken of, and a config that was never
# tried has no row that could be wrong.
SPACE = 1


@dataclass(frozen=True)
class Environment:
    """What else a time depends on. A row from another environment is kept, and not used.

    templates  hash of the op's template and all it includes, comments aside
    triton     its major.minor version, which is what its code generation changes with
    protocol   version of the timing protocol
    cuda       releases of Triton's ptxas, which allocates registers and schedules: see `toolchain.cuda_version`. "" in
               rows that were written before it was, whose ptxas is not known: they are kept, and not used
    space      version of what a config's knobs mean
    """

    templates: str
    triton: str
    protocol: int
    cuda: str = ""
    space: int = 1

    @classmethod
    def here(cls, templates: str) -> Environment:
        """That of this process."""
        return cls(templates, triton_version(), PROTOCOL, cuda_version(), SPACE)

    def to_dict(self) -> dict[str, Scalar]:
        """Every field; those of LATER where they are not at their default."""
        return {name: value for name, value in asdict(self).items() if LATER.get(name) != value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Environment:
        """The environment that `to_dict` wrote. Raises ArgumentError on unknown or missing fields."""
        names = {f.name for f in fields(cls)}
        if not names - set(LATER) <= set(data) <= names:
            raise ArgumentError("environment", sorted(data), f"the fields {sorted(names)}")
        return cls(**data)


# Fields that came after records were first written: absent from a record, they are at their default there.
LATER: dict[str, Scalar] = {"cuda": "", "space": 1}


@dataclass(frozen=True)
class Key:
    """Every field that a measured time depends on.

    Left out, and why: the exact sizes (a bucket is tuned at its representative shape), torch's version and that of
    the CUDA that it was built with (they allocate and launch, but compile nothing), the driver's (it loads what
    ptxas made).
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
        return self._flat(self.spec.to_dict(), self.bucket.to_dict(), self.environment.to_dict())

    def every_field(self) -> dict[str, Scalar]:
        """As `flat`, with no field left out: the same fields in the same order for every key, to sort keys by."""
        return self._flat(asdict(self.spec), asdict(self.bucket), asdict(self.environment))

    @cached_property
    def order(self) -> tuple[Scalar, ...]:
        """The values of `every_field`, of which a sort asks for again and again."""
        return tuple(self.every_field().values())

    def _flat(self, spec: dict[str, Any], bucket: dict[str, Any], environment: dict[str, Any]) -> dict[str, Scalar]:
        flat: dict[str, Scalar] = {"gpu": self.gpu}
        for part, values in (("spec", spec), ("bucket", bucket), ("environment", environment)):
            flat.update({f"{part}.{name}": value for name, value in values.items()})
        return flat

    @cached_property
    def digest(self) -> str:
        """32 hex digits of the SHA-256 of the fields in clear."""
        text = json.dumps(self.flat(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def diff(self, other: Key) -> dict[str, tuple[Scalar | None, Scalar | None]]:
        """The fields that differ: name -> (mine, the other's), None for one of spec or bucket that is left out."""
        mine, theirs = (
            key._flat(key.spec.to_dict(), key.bucket.to_dict(), asdict(key.environment)) for key in (self, other)
        )
        names = [*mine, *(name for name in theirs if name not in mine)]
        return {n: (mine.get(n), theirs.get(n)) for n in names if mine.get(n) != theirs.get(n)}

    @classmethod
    def here(cls, gpu: str, spec: KernelSpec, bucket: Bucket, templates: str) -> Key:
        """The key under which results count in this process: with the Triton and ptxas that are installed."""
        return cls(gpu, spec, bucket, Environment.here(templates))

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Key:
        """The key that `flat` wrote. Raises ArgumentError or KeyError on fields that are not a key's."""
        parts: dict[str, dict[str, Any]] = {"spec": {}, "bucket": {}, "environment": {}}
        for name, value in flat.items():
            part, dot, field = name.partition(".")
            if dot:
                parts[part][field] = value
        return cls(
            gpu=flat["gpu"],
            spec=KernelSpec.from_dict(parts["spec"]),
            bucket=Bucket.from_dict(parts["bucket"]),
            environment=Environment.from_dict(parts["environment"]),
        )
