"""The sizes of one call, and the bucket they fall into."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from parallax_gen.errors import ArgumentError

# Shorter sequences fill less than one tile of any config, so they share a bucket.
SHORTEST = 128
# The largest size that is read from a file: more than any card holds, and what is computed from it still fits a float.
LARGEST_SIZE = 2**62


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: `heads` are query heads; seqlen_q is 1 for decode; seqlen_kv counts cached keys.

    For packed sequences, batch is the number of sequences, and the lengths are the maximum lengths. window is the
    maximum number of keys that a query sees, 0 for no limit.
    """

    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_kv: int
    window: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            minimum = 0 if field.name == "window" else 1
            if type(value) is not int or value < minimum:
                raise ArgumentError(field.name, f"{value!r:.80}", f"an int of {minimum} or more")
        if self.heads % self.kv_heads:
            raise ArgumentError("heads", self.heads, f"a multiple of kv_heads ({self.kv_heads})")

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def to_dict(self) -> dict[str, int]:
        return _to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Shape:
        _check_names("shape", data, cls)
        return within_bounds(cls(**data))

    def __str__(self) -> str:
        heads = str(self.heads) if self.group == 1 else f"{self.heads}/{self.kv_heads}"
        lengths = str(self.seqlen_kv) if self.seqlen_q == self.seqlen_kv else f"{self.seqlen_q}x{self.seqlen_kv}"
        window = f", window {self.window}" if self.window else ""
        return f"batch {self.batch}, heads {heads}, seqlen {lengths}{window}"


@dataclass(frozen=True)
class Bucket:
    """The shapes that share a config: each size is a power of two, and represents all sizes nearest to it.

    kv_rows    batch * kv_heads, the number of (sequence, kv head) pairs: each has its own keys
    seqlen_q   1 for decode
    seqlen_kv
    window     0 for none
    """

    kv_rows: int
    seqlen_q: int
    seqlen_kv: int
    window: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            no_window = field.name == "window" and value == 0
            if type(value) is not int or (not no_window and (value < 1 or value & (value - 1))):
                raise ArgumentError(field.name, f"{value!r:.80}", "a power of two")

    def to_dict(self) -> dict[str, int]:
        return _to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Bucket:
        _check_names("bucket", data, cls)
        return within_bounds(cls(**data))

    def __str__(self) -> str:
        lengths = str(self.seqlen_kv) if self.seqlen_q == self.seqlen_kv else f"{self.seqlen_q}x{self.seqlen_kv}"
        window = f", window {self.window}" if self.window else ""
        return f"batch x kv_heads {self.kv_rows}, seqlen {lengths}{window}"


AnySizes = TypeVar("AnySizes", Shape, Bucket)

# Fields that were added after the first records: a record without such a field means its default.
ADDED_FIELDS = ("window",)


def _to_dict(sizes: Shape | Bucket) -> dict[str, int]:
    """All fields, except fields of ADDED_FIELDS that have their default."""
    return {name: value for name, value in vars(sizes).items() if value or name not in ADDED_FIELDS}


def _check_names(argument: str, data: Mapping[str, Any], kind: type[Shape] | type[Bucket]) -> None:
    names = {f.name for f in fields(kind)}
    if not names - set(ADDED_FIELDS) <= set(data) <= names:
        raise ArgumentError(argument, sorted(data), f"the fields {sorted(names)}")


def within_bounds(sizes: AnySizes) -> AnySizes:
    """Check sizes that were read from a file. Raises ArgumentError if no card could hold them."""
    for name, value in vars(sizes).items():
        if value > LARGEST_SIZE:
            raise ArgumentError(name, f"{value!r:.80}", f"at most {LARGEST_SIZE}")
    return sizes


def bucket_of(shape: Shape) -> Bucket:
    """The bucket of a shape: every size rounded to the nearest power of two on a logarithmic scale.

    2**n represents all sizes from 2**(n - 1/2) up to 2**(n + 1/2), so the size that a config was tuned at differs from
    a call's by at most a factor of sqrt(2). Lengths under 128 count as 128, except the single query of a decode step.
    """
    seqlen_q = 1 if shape.seqlen_q == 1 else _nearest_power_of_two(max(shape.seqlen_q, SHORTEST))
    return Bucket(
        kv_rows=_nearest_power_of_two(shape.batch * shape.kv_heads),
        seqlen_q=seqlen_q,
        seqlen_kv=_nearest_power_of_two(max(shape.seqlen_kv, SHORTEST)),
        window=_nearest_power_of_two(max(shape.window, SHORTEST)) if shape.window else 0,
    )


def lengths_near(length: int) -> tuple[int, str]:
    """A bucket's length for this one, and the lengths that it represents: `4096` and `2897 to 5792`."""
    power = _nearest_power_of_two(max(length, SHORTEST))
    return power, _range(power, SHORTEST)


def sizes_of(bucket: Bucket) -> str:
    """The sizes that a bucket represents: `batch x kv_heads 6 to 11, seqlen 2897 to 5792`."""
    keys = _range(bucket.seqlen_kv, SHORTEST)
    if bucket.seqlen_q == bucket.seqlen_kv:
        lengths = f"seqlen {keys}"
    else:
        queries = "1 query" if bucket.seqlen_q == 1 else f"{_range(bucket.seqlen_q, SHORTEST)} queries"
        lengths = f"{queries}, {keys} keys"
    window = f", window {_range(bucket.window, SHORTEST)}" if bucket.window else ""
    return f"batch x kv_heads {_range(bucket.kv_rows, 1)}, {lengths}{window}"


def _range(power: int, least: int) -> str:
    """The sizes that a power of two represents; `least` represents all smaller ones, too."""
    smallest = 1 if power <= least else math.isqrt(power * power // 2) + 1
    largest = math.isqrt(2 * power * power)
    return str(power) if smallest == largest else f"{smallest} to {largest}"


def representative(bucket: Bucket, group: int) -> Shape:
    """The shape that a bucket is tuned at: its own sizes, with kv_rows as a batch times at most 8 kv heads."""
    kv_heads = min(8, bucket.kv_rows)
    return Shape(
        batch=bucket.kv_rows // kv_heads,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        seqlen_q=bucket.seqlen_q,
        seqlen_kv=bucket.seqlen_kv,
        window=bucket.window,
    )


LENGTH_RATIO = 32  # of the longest to the shortest sequence, in timed batches of different lengths


def spread_lengths(shape: Shape) -> tuple[int, ...]:
    """Lengths from all keys down to a 32nd of them, in a geometric sequence; all keys for a single sequence."""
    fractions = [LENGTH_RATIO ** -(i / max(1, shape.batch - 1)) for i in range(shape.batch)]
    return tuple(max(1, round(shape.seqlen_kv * fraction)) for fraction in fractions)


def skewed_lengths(shape: Shape) -> tuple[int, ...]:
    """Lengths with all keys in the first sequence, and a 32nd of them in every other."""
    return (shape.seqlen_kv, *[max(1, round(shape.seqlen_kv / LENGTH_RATIO))] * (shape.batch - 1))


def _nearest_power_of_two(size: int) -> int:
    return 1 << round(math.log2(size))
