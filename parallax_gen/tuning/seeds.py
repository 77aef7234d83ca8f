"""The configs that a tune tries first, from records of the place's bucket, of other cache layouts and of near buckets.

They rank records by time alone, across kernels and toolchains: a search measures what they name, and no call gets it
for this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from parallax_gen.memory.place import Place
from parallax_gen.memory.result import Result
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.problem.shapes import Bucket

_Group = TypeVar("_Group", bound=Hashable)
LAYOUT_FIELDS = ("page_size", "cache_dtype", "leftpad", "stats")  # of a spec: cache layout, extra outputs


def fastest_of_each(results: Iterable[Result], group_of: Callable[[Result], _Group]) -> dict[_Group, Result]:
    """The fastest measured result of each group, the first of a tie; groups in the order of the results."""
    fastest_of: dict[_Group, Result] = {}
    for result in results:
        if result.measured:
            group = group_of(result)
            fastest_of[group] = min(fastest_of.get(group, result), result, key=lambda result: result.time_us or 0.0)
    return fastest_of


def nearest_buckets(bucket: Bucket, buckets: Iterable[Bucket], *, kv_rows_first: bool = False) -> list[Bucket]:
    """Other buckets, the nearest first, by the ratios of all sizes; with kv_rows_first by that of kv_rows first."""

    def distance(other: Bucket) -> tuple[float, float]:
        ratios = {n: abs(math.log2(max(size, 1) / max(getattr(bucket, n), 1))) for n, size in vars(other).items()}
        return ratios.pop("kv_rows") if kv_rows_first else 0.0, sum(ratios.values())

    return sorted(buckets, key=distance)


def shipped_seeds(place: Place, shipped: Sequence[Result]) -> list[KernelConfig]:
    """Seed configs for a place from the shipped records of its capability (`load_same_capability`).

    All configs of its bucket, then the best at this bucket for each other cache layout, then the best of each other
    bucket.
    """
    records = [r for r in shipped if r.place.spec == place.spec]
    same_bucket = [r.config for r in records if r.place.bucket == place.bucket]
    # A file has each place's fastest record first, so reversed dicts keep it.
    layouts = {r.place: r.config for r in reversed(shipped) if _differ_in_layout(r.place, place)}
    best = {r.place.bucket: r.config for r in reversed(records)}
    return list(dict.fromkeys([*same_bucket, *layouts.values(), *best.values()]))


def nearby_seeds(place: Place, results: Sequence[Result]) -> list[KernelConfig]:
    """Seed configs from a card's results: the best for each other cache layout, then for the two nearest buckets."""
    layouts = fastest_of_each((r for r in results if _differ_in_layout(r.place, place)), lambda r: r.place.spec)
    other_buckets = (r for r in results if r.place.spec == place.spec and r.place.bucket != place.bucket)
    best = fastest_of_each(other_buckets, lambda r: r.place.bucket)
    nearest = [best[bucket] for bucket in nearest_buckets(place.bucket, best)[:2]]
    return list(dict.fromkeys(result.config for result in (*layouts.values(), *nearest)))


def _differ_in_layout(a: Place, b: Place) -> bool:
    """Whether two places differ, but only in the softcap and, for decode with per-sequence lengths, LAYOUT_FIELDS."""
    free = ("softcap", *LAYOUT_FIELDS) if op_of(a.spec).per_sequence_lengths else ("softcap",)
    same = all(value == vars(b.spec)[name] for name, value in vars(a.spec).items() if name not in free)
    return a.bucket == b.bucket and a.spec != b.spec and same
