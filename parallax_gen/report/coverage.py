"""How much of a basket's calls finds a config by measurement, and of which kind: weighted shares by tier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from parallax_gen.memory.place import Place, place_of
from parallax_gen.memory.ranking import RecordSource, Tier, best
from parallax_gen.problem.basket import KINDS, BasketCall
from parallax_gen.problem.hardware import Gpu
from parallax_gen.report.listing import TIER_WORDS
from parallax_gen.tables import Table


@dataclass(frozen=True)
class Coverage:
    """The calls of one kind on a card. places: kernels and buckets; weights: those of their calls, by tier."""

    kind: str
    places: int
    weights: Counter[Tier]

    def share(self, tier: Tier) -> float:
        return self.weights[tier] / self.weights.total() if self.weights else 0.0

    def to_json(self) -> dict[str, Any]:
        shares = {TIER_WORDS[tier]: round(self.share(tier), 4) for tier in Tier}
        return {"calls": self.kind, "places": self.places, "shares": shares}


def coverage(calls: Iterable[BasketCall], gpu: Gpu, memory: RecordSource) -> list[Coverage]:
    """By kind of call, and of all, last. Calls of one place add their weights. Borrowed kernels are not checked."""
    weights: dict[str, Counter[Place]] = {kind: Counter() for kind in KINDS}
    for call in calls:
        weights[call.kind][place_of(gpu.name, call.spec, call.shape)] += call.weight
    tiers = {place: best(place, gpu, memory).tier for of_kind in weights.values() for place in of_kind}
    found = []
    for kind, of_kind in (*weights.items(), ("all", sum(weights.values(), Counter[Place]()))):
        by_tier: Counter[Tier] = Counter()
        for place, weight in of_kind.items():
            by_tier[tiers[place]] += weight
        found.append(Coverage(kind, len(of_kind), by_tier))
    return found


def coverage_table(found: Iterable[Coverage], gpu: Gpu) -> Table:
    """A line for each kind of call."""
    columns = ("calls", "places", *(TIER_WORDS[tier] for tier in Tier))
    rows = [(c.kind, f"{c.places}", *(f"{c.share(tier):.1%}" for tier in Tier)) for c in found]
    return Table(
        f"{gpu.name}, weighted shares of a basket's calls by where their config comes from", columns, rows, columns[1:]
    )
