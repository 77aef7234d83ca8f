"""What a result is here: whose it is, what of it is not as in this process, and what it counts for at its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from parallax_gen.codegen.device import card_named
from parallax_gen.errors import UnknownGpuError
from parallax_gen.memory.gains import gain
from parallax_gen.memory.guard import Guarded, guarded
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Candidate, Known, Table, Tier, default_beside, default_of, is_rendered
from parallax_gen.memory.result import PROTOCOL, Outcome, Result, newest_toolchain_first
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.problem.hardware import GPUS, Gpu, gpu_by_name
from parallax_gen.problem.shapes import Shape, representative
from parallax_gen.problem.spec import FAMILIES
from parallax_gen.problem.work import rate, rate_unit

ANOTHER_KERNEL = "another kernel than today's"
NOT_CHECKED = "not yet checked: a first call compiles it here, and drops it where it spills far more than the default"
AS_HERE = "this Triton"  # with this ptxas, and of today's kernel


def open_memory() -> Memory:
    """The user's database, only to be read, over what ships. Raises StoreError if it cannot be used."""
    return Memory(Store(read_only=True))


class Origins:
    """Says of results whose they are: "yours" or "shipped"."""

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
        """Every field of a result, and what is worked out from them."""
        spec, time_us = result.place.spec, result.time_us
        unlike = unlike_here(result)
        return {
            **result.to_dict(),
            "origin": self.of(result),
            "used": not unlike,
            "unlike_here": list(unlike),
            "rate": rate(spec, shape_of(result), time_us) if time_us else None,
            "rate_unit": rate_unit(spec.op),
        }


def shape_of(result: Result) -> Shape:
    """The sizes its time is of."""
    return result.shape or representative(result.place.bucket, result.place.spec.group)


def unlike_here(result: Result) -> tuple[str, ...]:
    """What of a result is not as in this process, for people: `triton 3.8 (here 3.9)`. Empty if nothing."""
    evidence, here = result.evidence, Toolchain.here()
    told = () if is_rendered(result, card_of(result.place)) else (ANOTHER_KERNEL,)
    pairs = {
        "triton": (minor(evidence.triton), minor(here.triton)),
        "cuda": (evidence.cuda or "unknown", here.cuda or "none"),
        "protocol": (evidence.protocol, PROTOCOL),
    }
    return (*told, *(f"{name} {there} (here {mine})" for name, (there, mine) in pairs.items() if there != mine))


def chosen(place: Place, known: Known) -> Guarded:
    """What a call at a place gets, as far as it was checked here."""
    return guarded(place, card_of(place), known)


def standing(choice: Guarded) -> str:
    """As `rests_on`, and whether that was `not yet checked`: a first call may drop it."""
    return as_checked(rests_on(choice.candidate), choice.checked)


def as_checked(what: str, checked: bool) -> str:
    """What a choice rests on, with a remark where it is not yet checked."""
    return what if checked else f"{what} (not yet checked)"


def rests_on(candidate: Candidate) -> str:
    """What a choice rests on, in a few words: `this Triton`, `Triton 3.6`, `Triton 3.6, protocol 0 on h100`."""
    record = candidate.record
    if record is None:
        return "the default"
    evidence, here, toolchain = record.evidence, Toolchain.here(), AS_HERE
    if minor(evidence.triton) != minor(here.triton):
        toolchain = f"Triton {minor(evidence.triton)}"
    elif not evidence.toolchain.like(here):
        toolchain = f"ptxas {evidence.cuda or 'unknown'}"
    if evidence.protocol != PROTOCOL:
        toolchain += f", protocol {evidence.protocol}"
    if candidate.tier == Tier.NEIGHBOUR:
        return f"{toolchain} at {record.place.bucket}"
    return f"{toolchain} on {record.place.gpu}" if candidate.tier == Tier.SIBLING_CARD else toolchain


def card_of(place: Place) -> Gpu:
    """The card that a place's name stands for; of one that is neither in the table nor in this machine, a stand-in."""
    return card_named(place.gpu) or GPUS["h200"]


def name_in_records(gpu: str, results: Iterable[Result]) -> str:
    """The name under which records of a GPU go. Raises UnknownGpuError for one that nothing is known by."""
    try:
        return gpu_by_name(gpu).name
    except UnknownGpuError:
        if any(result.place.gpu == gpu for result in results):
            return gpu
        raise


# -- What is listed of places


@dataclass(frozen=True)
class Listed:
    """A result that is listed for a place, and what it counts for there.

    tier     what a call at the place rests on, where the row is what it gets; else why the row is not used
    checked  False where it is borrowed, and a first call may still drop it: see memory/guard.py
    default  the place's default config, timed as the result was; None where it was not, or the row is not used
    """

    place: Place
    result: Result
    tier: str
    default: Result | None = None
    checked: bool = True

    @property
    def by(self) -> str:
        """The tier, and whether that is not yet checked."""
        return as_checked(self.tier, self.checked)

    @property
    def gain(self) -> float | None:
        """The default's time over the row's."""
        return gain(self.result, self.default)


def of_places(results: list[Result], known: Known) -> list[Listed]:
    """What calls get at each place; where that is the default, the best of what is known and not used."""
    rows = []
    for place, group in groupby(results, key=lambda r: r.place):  # sorted: the best come first
        choice, first = chosen(place, known), next(group)
        record = choice.candidate.record
        if record is None:
            rows.append(Listed(place, first, "not used" if first.measured else "never measured"))
        else:
            default = default_beside(record, default_of(place, card_of(place)), card_of(record.place), known)
            rows.append(Listed(place, record, rests_on(choice.candidate), default, choice.checked))
    return rows


def of_every_config(results: list[Result]) -> list[Listed]:
    """All that is known of each place."""
    rows = []
    for place, of_place in groupby(results, key=lambda r: r.place):
        card, group = card_of(place), list(of_place)
        default = default_of(place, card)
        defaults = Table(r for r in group if r.config == default)
        for result in group:
            unlike = unlike_here(result)
            used = result.measured and ANOTHER_KERNEL not in unlike
            beside = default_beside(result, default, card, defaults) if used else None
            rows.append(Listed(place, result, ", ".join(unlike) or AS_HERE, beside))
    return rows


# -- What a database holds, counted


def by_kernel(results: list[Result]) -> list[dict[str, Any]]:
    """Counts of each GPU and op, by outcome."""
    outcomes: dict[tuple[str, str], Counter[Outcome]] = {}
    for result in results:
        outcomes.setdefault((result.place.gpu, result.place.spec.family), Counter())[result.outcome] += 1
    return [
        {"gpu": gpu, "op": op, "rows": kinds.total(), "outcomes": dict(kinds)} for (gpu, op), kinds in outcomes.items()
    ]


def by_toolchain(results: list[Result]) -> list[dict[str, Any]]:
    """Counts of each toolchain and protocol, the newest first."""
    groups: dict[Any, list[Result]] = {}
    for result in newest_toolchain_first(results):
        groups.setdefault((result.evidence.toolchain, result.evidence.protocol), []).append(result)
    return [
        {
            "triton": toolchain.triton,
            "cuda": toolchain.cuda,
            "protocol": protocol,
            "ops": sorted({row.place.spec.family for row in rows}, key=FAMILIES.index),
            "rows": len(rows),
            "of_todays_kernels": sum(is_rendered(row, card_of(row.place)) for row in rows),
            "newest": max(rows, key=lambda row: row.created).created_at,
            "here": toolchain.like(Toolchain.here()) and protocol == PROTOCOL,
        }
        for (toolchain, protocol), rows in groups.items()
    ]
