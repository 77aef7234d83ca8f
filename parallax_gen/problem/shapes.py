"""The sizes of one call, the bucket they fall in, and the work they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.spec import KernelSpec

# Shorter sequences fill less than one tile of any config: they share a bucket.
SHORTEST = 128


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: `heads` are query heads; seqlen_q is 1 for decode; seqlen_kv counts cached keys."""

    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_kv: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ArgumentError(field.name, repr(value), "an int of 1 or more")
        if self.heads % self.kv_heads:
            raise ArgumentError("heads", self.heads, f"a multiple of kv_heads ({self.kv_heads})")

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Shape:
        names = {f.name for f in fields(cls)}
        if set(data) != names:
            raise ArgumentError("shape", sorted(data), f"exactly the fields {sorted(names)}")
        return cls(**data)

    def __str__(self) -> str:
        heads = str(self.heads) if self.group == 1 else f"{self.heads}/{self.kv_heads}"
        lengths = str(self.seqlen_kv) if self.seqlen_q == self.seqlen_kv else f"{self.seqlen_q}x{self.seqlen_kv}"
        return f"batch {self.batch}, heads {heads}, seqlen {lengths}"


@dataclass(frozen=True)
class Bucket:
    """The shapes that share a config: each size is a power of two, and stands for all sizes nearest to it.

    kv_rows    batch * kv_heads: how many independent (sequence, kv head) pairs there are to spread out
    seqlen_q   1 for decode
    seqlen_kv
    """

    kv_rows: int
    seqlen_q: int
    seqlen_kv: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1 or value & (value - 1):
                raise ArgumentError(field.name, repr(value), "a power of two")

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Bucket:
        names = {f.name for f in fields(cls)}
        if set(data) != names:
            raise ArgumentError("bucket", sorted(data), f"exactly the fields {sorted(names)}")
        return cls(**data)

    def __str__(self) -> str:
        lengths = str(self.seqlen_kv) if self.seqlen_q == self.seqlen_kv else f"{self.seqlen_q}x{self.seqlen_kv}"
        return f"{self.kv_rows} kv rows, seqlen {lengths}"


def bucket_of(shape: Shape) -> Bucket:
    """The bucket of a shape: every size rounded to the nearest power of two on a logarithmic scale.

    2**n stands for all sizes from 2**(n - 1/2) up to 2**(n + 1/2), so that a size is never more than a
    factor sqrt(2) from the one its config was tuned at. Lengths under 128 count as 128, except for the
    single query of a decode step.
    """
    seqlen_q = 1 if shape.seqlen_q == 1 else _nearest_power_of_two(max(shape.seqlen_q, SHORTEST))
    return Bucket(
        kv_rows=_nearest_power_of_two(shape.batch * shape.kv_heads),
        seqlen_q=seqlen_q,
        seqlen_kv=_nearest_power_of_two(max(shape.seqlen_kv, SHORTEST)),
    )


def representative(bucket: Bucket, group: int) -> Shape:
    """The shape that a bucket is tuned at: its own sizes, with up to 8 kv heads and the rest as batch."""
    kv_heads = min(8, bucket.kv_rows)
    return Shape(
        batch=bucket.kv_rows // kv_heads,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        seqlen_q=bucket.seqlen_q,
        seqlen_kv=bucket.seqlen_kv,
    )


@dataclass(frozen=True)
class Work:
    """What a call must do at the least: floating-point operations, and bytes of device memory moved."""

    flops: float
    bytes: float


def work_of(spec: KernelSpec, shape: Shape) -> Work:
    """Four matmuls of 2*D operations a (query, visible key) pair; each input read and each output written once."""
    visible: float = shape.seqlen_q * shape.seqlen_kv
    if spec.causal:
        # Row i sees max(0, seqlen_kv - seqlen_q + i + 1) keys. Counted as the area of the triangle or trapezium,
        # half when square: the usual convention for quoting causal rates.
        rows = min(shape.seqlen_q, shape.seqlen_kv)
        visible = rows * (shape.seqlen_kv - rows) + rows * rows / 2
    flops = 8 * shape.batch * shape.heads * spec.head_dim * visible
    kv = 2 * shape.batch * shape.kv_heads * shape.seqlen_kv * spec.head_dim
    outputs = 1 + int(spec.stats)  # o, and v̄ beside it
    qro = (2 + outputs) * shape.batch * shape.heads * shape.seqlen_q * spec.head_dim
    stats = 8 * shape.batch * shape.heads * shape.seqlen_q if spec.stats else 0  # lse and t̄, fp32
    return Work(flops=float(flops), bytes=float((kv + qro) * spec.bytes_per_element + stats))


def _nearest_power_of_two(size: int) -> int:
    return 1 << round(math.log2(size))
