"""What the kernels of calls rest on, by tier of the ranking, and the command that measures what is not measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from parallax_gen.codegen.device import card_named
from parallax_gen.memory.commands import tune_command
from parallax_gen.memory.descriptions import chosen
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordSource, Tier
from parallax_gen.tuning.job import DEFAULT_OPS, worklist

MAX_COMMANDS = 3  # shown for places outside the default jobs, which need one each
# Their kernels were measured, so timing the few best again suffices.
REFRESHED = (Tier.OTHER_TOOLCHAIN, Tier.SIBLING_CARD)
MEANINGS = {
    Tier.MEASURED_HERE: "measured on this card with this toolchain",
    Tier.OTHER_TOOLCHAIN: "measured on this card with another toolchain",
    Tier.SIBLING_CARD: "measured on a card of the same compute capability",
    Tier.NEAR_BUCKET: "the default, measured at a near bucket of sizes",
    Tier.DEFAULT: "not measured: the default config",
}


@dataclass(frozen=True)
class TierCount:
    """The places of one card whose calls get a kernel of one tier.

    unchecked  how many of them are borrowed, and a first call may still drop them: see memory/guard.py
    commands   what to run on the card to measure them, at most MAX_COMMANDS for places outside the default jobs
    left_out   the number of places whose command is not among them
    """

    tier: Tier
    places: int
    unchecked: int
    commands: tuple[str, ...]
    left_out: int

    @property
    def meaning(self) -> str:
        return MEANINGS[self.tier]


def tiers_of(places: Iterable[Place], memory: RecordSource) -> dict[str, tuple[TierCount, ...]]:
    """The tiers of the places of each card, best first; tiers without places are left out."""
    by_tier: dict[str, dict[Tier, list[tuple[Place, bool]]]] = {}
    for place in places:
        choice = chosen(place, memory)
        of_card = by_tier.setdefault(place.gpu, {})
        of_card.setdefault(choice.candidate.tier, []).append((place, choice.checked))
    return {gpu: tuple(_count(gpu, tier, tiers[tier]) for tier in sorted(tiers)) for gpu, tiers in by_tier.items()}


def _count(gpu: str, tier: Tier, choices: Sequence[tuple[Place, bool]]) -> TierCount:
    places = [place for place, _ in choices]
    commands, left_out = _commands(gpu, tier, places)
    return TierCount(tier, len(places), sum(not checked for _, checked in choices), commands, left_out)


def _commands(gpu: str, tier: Tier, places: Sequence[Place]) -> tuple[tuple[str, ...], int]:
    """The commands that measure these places, and the number of places that they do not measure."""
    if tier == Tier.MEASURED_HERE:
        return (), 0
    if tier in REFRESHED:
        return ("parallax-gen tune --refresh",), 0
    ops, others = _ops_of_default_jobs(gpu, places)
    default_jobs = "".join(f" --op {op}" for op in ops if set(ops) != set(DEFAULT_OPS))
    commands = [f"parallax-gen tune{default_jobs}"] if ops else []
    return (*commands, *map(tune_command, others[:MAX_COMMANDS])), len(others[MAX_COMMANDS:])


def _ops_of_default_jobs(gpu: str, places: Sequence[Place]) -> tuple[list[str], list[Place]]:
    """The values of --op for which `tune` has these places among its default jobs, and the places that it has not."""
    card = card_named(gpu)
    jobs = {op: {job.place for job in worklist(card, ops=(op,))} for op in DEFAULT_OPS} if card else {}
    ops = [op for op in DEFAULT_OPS if op in jobs and not jobs[op].isdisjoint(places)]
    return ops, [place for place in places if not any(place in of_op for of_op in jobs.values())]
