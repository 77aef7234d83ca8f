"""Describes results for people: their origin, how they differ from this process, and how their places use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from typing import Any

from parallax_gen.codegen.device import card_named
from parallax_gen.errors import UnknownGpuError
from parallax_gen.memory.gains import gain
from parallax_gen.memory.guard import CheckedChoice, checked_choice
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import (
    Candidate,
    RecordSource,
    RecordTable,
    Tier,
    comparable_default,
    default_of,
    is_rendered,
    sibling_places,
)
from parallax_gen.memory.result import PROTOCOL, Outcome, Result, newest_toolchain_first
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.hardware import GPUS, Gpu, gpu_by_name
from parallax_gen.problem.shapes import Shape, representative
from parallax_gen.problem.spec import PUBLIC_OPS
from parallax_gen.problem.work import rate, rate_unit

ANOTHER_KERNEL = "another kernel than today's"
NOT_CHECKED = "not yet checked: a first call compiles it here, and drops it if it spills far more than the default"
AS_HERE = "this Triton"  # and this ptxas, and today's kernel


def open_memory() -> Memory:
    """The user's database, read-only, merged with the shipped records. Raises StoreError if it cannot be used."""
    return Memory(Store(read_only=True))


class Origins:
    """Says of each result whether the user measured it or it was shipped."""

    def __init__(self, memory: Memory, gpu: str | None = None):
        self._own = frozenset(memory.store.all(gpu)) if memory.store else frozenset()

    def of(self, result: Result) -> str:
        return "yours" if result in self._own else "shipped"

    def status(self, result: Result) -> str:
        """One word: measured (by the user), shipped, predicted, or how it failed."""
        if not result.measured:
            return result.outcome.value
        return "measured" if result in self._own else "shipped"

    def to_json(self, result: Result) -> dict[str, Any]:
        """All fields of a result, and values derived from them.

        "used" means that the result does not differ from this process: "unlike_here", the differences, is empty. Calls
        may use results of other toolchains, too.
        """
        spec, time_us = result.place.spec, result.time_us
        differences = differences_from_here(result)
        return {
            **result.to_dict(),
            "origin": self.of(result),
            "used": not differences,
            "unlike_here": list(differences),
            "rate": rate(spec, shape_of(result), time_us) if time_us else None,
            "rate_unit": rate_unit(spec.op),
        }


def rows_of_kinds(
    rows: Iterable[Result], before: datetime | None, *, other_environments: bool, failures: bool, predicted: bool
) -> list[Result]:
    """The rows of any of the named kinds, or of every kind if none is named.

    before              only rows that are older; None for all
    other_environments  of another toolchain, or of another kernel than today's
    """

    def is_selected(row: Result) -> bool:
        return (
            not (other_environments or failures or predicted)
            or (other_environments and bool(differences_from_here(row)))
            or (failures and row.outcome.failed)
            or (predicted and not row.outcome.tried)
        )

    return [row for row in rows if (before is None or row.created < before) and is_selected(row)]


def shape_of(result: Result) -> Shape:
    """The shape that a result was timed at."""
    return result.shape or representative(result.place.bucket, result.place.spec.group)


def differences_from_here(result: Result) -> tuple[str, ...]:
    """How a result's evidence differs from this process, for people: `triton 3.8 (here 3.9)`. Empty if it does not."""
    evidence, here = result.evidence, Toolchain.here()
    kernel = () if is_rendered(result, card_of(result.place)) else (ANOTHER_KERNEL,)
    pairs = {
        "triton": (minor(evidence.triton), minor(here.triton)),
        "cuda": (evidence.cuda or "unknown", here.cuda or "none"),
        "protocol": (evidence.protocol, PROTOCOL),
    }
    return (*kernel, *(f"{name} {theirs} (here {ours})" for name, (theirs, ours) in pairs.items() if theirs != ours))


def chosen(place: Place, memory: RecordSource) -> CheckedChoice:
    """The kernel that a call at a place gets, by the checks that are cached here."""
    return checked_choice(place, card_of(place), memory)


def choice_text(choice: CheckedChoice, gpu: str) -> str:
    """The evidence for a choice on a card, marked `(not yet checked)` if a first call may drop it."""
    return mark_unchecked(evidence_text(choice.candidate, gpu), choice.checked)


def mark_unchecked(text: str, checked: bool) -> str:
    """A text about a choice, marked if the choice is not yet checked."""
    return text if checked else f"{text} (not yet checked)"


def evidence_text(candidate: Candidate, gpu: str) -> str:
    """The evidence for a candidate on a card: `this Triton`, `Triton 3.6`, `Triton 3.6, protocol 0 on h100`.

    gpu  its name in records
    """
    record = candidate.record
    if record is None:
        return candidate.source
    evidence, here, toolchain = record.evidence, Toolchain.here(), AS_HERE
    if minor(evidence.triton) != minor(here.triton):
        toolchain = f"Triton {minor(evidence.triton)}"
    elif not evidence.toolchain.compiles_like(here):
        toolchain = f"ptxas {evidence.cuda or 'unknown'}"
    if evidence.protocol != PROTOCOL:
        toolchain += f", protocol {evidence.protocol}"
    if candidate.tier == Tier.NEAR_BUCKET:
        toolchain += f" at {record.place.bucket}"
    return toolchain if record.place.gpu == gpu else f"{toolchain} on {record.place.gpu}"


def card_of(place: Place) -> Gpu:
    """The GPU of a place. For a GPU that is neither in the table nor in this machine, the H200."""
    return card_named(place.gpu) or GPUS["h200"]


def name_in_records(gpu: str, results: Iterable[Result]) -> str:
    """A GPU's name in records. Raises UnknownGpuError if neither the table nor any record has it."""
    try:
        return gpu_by_name(gpu).name
    except UnknownGpuError:
        if any(result.place.gpu == gpu for result in results):
            return gpu
        raise


def borrowed_places(gpu: str, results: Iterable[Result]) -> list[Place]:
    """The places of a card at which its calls may borrow one of the measurements of sibling cards.

    gpu  its name in records
    """
    card = card_named(gpu)
    if card is None:
        return []
    theirs = dict.fromkeys(result.place for result in results if result.measured and result.place.gpu != gpu)
    return [own for place in theirs if place in sibling_places(own := replace(place, gpu=gpu), card)]


# -- The lines of `parallax-gen list`


@dataclass(frozen=True)
class ListLine:
    """One line of `parallax-gen list`: a config at a place, and how the place uses it.

    result    None for a default without any result
    evidence  the evidence for the place's choice, if calls get this config; else why it is not used
    tier      of the place's choice; None for a result of `results_of_places`
    default   the comparable result of the default config; None if there is none, or calls do not get this result
    checked   False if it is borrowed and a first call may still drop it: see memory/guard.py
    """

    place: Place
    config: KernelConfig
    result: Result | None
    evidence: str
    tier: Tier | None = None
    default: Result | None = None
    checked: bool = True

    @property
    def evidence_with_mark(self) -> str:
        """The evidence, marked if the result is not yet checked."""
        return mark_unchecked(self.evidence, self.checked)

    @property
    def gain(self) -> float | None:
        """The default's time divided by the result's."""
        return None if self.result is None else gain(self.result, self.default)


def choices_of_places(places: Iterable[Place], memory: RecordSource) -> list[ListLine]:
    """What calls get at each place; if they get the default, the place's best result, marked as not used."""
    return [_line_of_choice(place, memory) for place in places]


def _line_of_choice(place: Place, memory: RecordSource) -> ListLine:
    choice = chosen(place, memory)
    tier, record = choice.candidate.tier, choice.candidate.record
    if record is not None:
        default = comparable_default(record, default_of(place, card_of(place)), card_of(record.place), memory)
        evidence = evidence_text(choice.candidate, place.gpu)
        return ListLine(place, record.config, record, evidence, tier, default, choice.checked)
    results = memory.results(place)  # sorted: the best come first
    if not results:
        return ListLine(place, choice.candidate.config, None, "no results", tier)
    evidence = "not used" if results[0].measured else "never measured"
    return ListLine(place, results[0].config, results[0], evidence, tier)


def results_of_places(results: list[Result]) -> list[ListLine]:
    """All results of each place."""
    lines = []
    for place, place_results in groupby(results, key=lambda r: r.place):
        card, group = card_of(place), list(place_results)
        default = default_of(place, card)
        defaults = RecordTable(r for r in group if r.config == default)
        for result in group:
            differences = differences_from_here(result)
            used = result.measured and ANOTHER_KERNEL not in differences
            timed_default = comparable_default(result, default, card, defaults) if used else None
            evidence = ", ".join(differences) or AS_HERE
            lines.append(ListLine(place, result.config, result, evidence, default=timed_default))
    return lines


# -- Counts of the rows of a database


def by_kernel(results: list[Result]) -> list[dict[str, Any]]:
    """Row counts of each GPU and op, by outcome."""
    outcomes: dict[tuple[str, str], Counter[Outcome]] = {}
    for result in results:
        outcomes.setdefault((result.place.gpu, result.place.spec.public_op), Counter())[result.outcome] += 1
    return [
        {"gpu": gpu, "op": op, "rows": kinds.total(), "outcomes": dict(kinds)} for (gpu, op), kinds in outcomes.items()
    ]


def by_toolchain(results: list[Result]) -> list[dict[str, Any]]:
    """Row counts of each toolchain and protocol, the newest first."""
    groups: dict[Any, list[Result]] = {}
    for result in newest_toolchain_first(results):
        groups.setdefault((result.evidence.toolchain, result.evidence.protocol), []).append(result)
    return [
        {
            "triton": toolchain.triton,
            "cuda": toolchain.cuda,
            "protocol": protocol,
            "ops": sorted({row.place.spec.public_op for row in rows}, key=PUBLIC_OPS.index),
            "rows": len(rows),
            "of_todays_kernels": sum(is_rendered(row, card_of(row.place)) for row in rows),
            "newest": max(rows, key=lambda row: row.created).created_at,
            "here": toolchain.compiles_like(Toolchain.here()) and protocol == PROTOCOL,
        }
        for (toolchain, protocol), rows in groups.items()
    ]
