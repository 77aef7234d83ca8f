"""Ranks records: decides which config a call gets. Nothing else does: dispatch, tuner, export and reports use it.

Evidence is about a program: a record is usable if today's templates still render the kernel that was measured. Another
Triton or ptxas may have compiled it. Tiers, best first:

1. measured here: the same GPU, kernel and toolchain
2. other toolchain: the same GPU and kernel, compiled by another Triton or ptxas
3. sibling card: the same kernel on another GPU of the same capability, such as an H100's on an H200
4. near bucket: the default, which was at most MOST_LOSS times as slow as the fastest in a near bucket, first with other
   lengths, then with another kv_rows, on this card and then on a sibling
5. default: the heuristics

A sibling's preprocess, whose speed depends on its own card's memory, is evidence for the default alone, too.
docs/borrowing.md says why.

Within a tier the same toolchain goes first, then the newest; times are compared only within one card and toolchain.
Records of a search that did not know a knob value of today's default, or of a sibling's newer best, are skipped: what
they beat did not have it. Records whose kernel is no longer rendered only give the tuner hints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, Protocol

from parallax_gen.codegen.render import KernelSource, render, text_hash_of
from parallax_gen.memory.place import Place
from parallax_gen.memory.result import PROTOCOL, Evidence, Result, supersedes
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.ops.space import default_config, why_invalid
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.shapes import SHORTEST, representative

# Where a measurement counts as evidence for a default: its time over the fastest, and how many others were timed.
MOST_LOSS = 1.03
FEWEST_RIVALS = 2


class Tier(IntEnum):
    """How close a choice's evidence is to a measurement on this card with this toolchain."""

    MEASURED_HERE = 1
    OTHER_TOOLCHAIN = 2
    SIBLING_CARD = 3
    NEAR_BUCKET = 4
    DEFAULT = 5

    @property
    def text(self) -> str:
        texts = ("measured here", "another toolchain", "a sibling card", "a near bucket", "the default")
        return dict(zip(Tier, texts, strict=True))[self]


@dataclass(frozen=True)
class Candidate:
    """A config, and the record that supports it (None for the default, and for a config that a lock has)."""

    tier: Tier
    config: KernelConfig
    record: Result | None
    locked: bool = False  # then no record was looked up, and the tier is the default's

    @property
    def source(self) -> str:
        return "the lock" if self.locked else self.tier.text

    @property
    def supports_default(self) -> bool:
        """Whether the record was looked up as evidence for the default alone."""
        if self.tier != Tier.SIBLING_CARD or self.record is None:
            return self.tier == Tier.NEAR_BUCKET
        return not op_of(self.record.place.spec).uses_sibling_records


def ranked(place: Place, gpu: Gpu, memory: RecordSource, here: Toolchain | None = None) -> Iterator[Candidate]:
    """The candidates of a call at a place, best first; the default is the last. Renders lazily.

    gpu   the card of the place
    here  the toolchain that compiles the call's kernel; by default this process's
    """
    default = default_of(place, gpu)
    results = memory.results(place)
    tried_here = _tried_here(results, here)

    def usable(record: Result) -> bool:
        return is_rendered(record, gpu) and _overruling(record, tried_here, gpu) is None

    sibling_searches = _sibling_searches(place, gpu, memory, here)
    for search in _searches(results, here):
        if not _why_skipped(search, default, sibling_searches, gpu):
            tier = Tier.MEASURED_HERE if search.matches_here else Tier.OTHER_TOOLCHAIN
            yield from (Candidate(tier, r.config, r) for r in search.measured if usable(r))
    for search in sibling_searches:
        yield from (Candidate(Tier.SIBLING_CARD, r.config, r) for r in search.measured if usable(r))
    for other in _last_places(place, gpu):
        for search in _searches(memory.results(other), here):
            supporting = [] if search.unknown_knob(default) else _supporting(search.measured, default)
            if record := next(filter(usable, supporting), None):
                tier = Tier.SIBLING_CARD if other.bucket == place.bucket else Tier.NEAR_BUCKET
                yield Candidate(tier, record.config, record)
    yield Candidate(Tier.DEFAULT, default, None)


def best(place: Place, gpu: Gpu, memory: RecordSource, here: Toolchain | None = None) -> Candidate:
    """The first candidate of `ranked`."""
    return next(ranked(place, gpu, memory, here))


def comparable_default(record: Result, default: KernelConfig, gpu: Gpu, memory: RecordSource) -> Result | None:
    """The default's record at a record's place, of today's kernel and with a comparable time; None if there is none.

    default  today's default config of the call, at the record's place or at a sibling card's
    gpu      the record's card
    """
    timed = [
        result
        for result in memory.results(record.place)
        if result.config == default and result.measured and comparable(result.evidence, record.evidence)
    ]
    timed.sort(key=lambda result: (_search_key(result) == _search_key(record), result.created), reverse=True)
    return next((result for result in timed if is_rendered(result, gpu)), None)


def comparable(a: Evidence, b: Evidence) -> bool:
    """Whether times on one card may be compared: toolchains that compile to the same programs, the same protocol."""
    same_compiler = a.toolchain == b.toolchain or a.toolchain.compiles_like(b.toolchain)
    return same_compiler and a.protocol == b.protocol


def default_of(place: Place, gpu: Gpu) -> KernelConfig:
    """The config of a call at a place that has no records."""
    return default_config(place.spec, representative(place.bucket, place.spec.group), gpu)


def near_places(place: Place, gpu: Gpu) -> list[Place]:
    """The same kernel at near buckets: first with other lengths, then with another kv_rows; the smaller size first.

    First those on the place's card `gpu`, then those on its sibling cards.
    """
    near, bucket = [], place.bucket
    lengths = ("seqlen_q", "seqlen_kv") if bucket.seqlen_q == bucket.seqlen_kv else ("seqlen_kv",)
    for names, minimum, factor in ((lengths, SHORTEST, 2), (lengths, SHORTEST, 4), (("kv_rows",), 1, 2)):
        size = getattr(bucket, names[0])
        for near_size in (size // factor, size * factor):
            if near_size >= minimum:
                near.append(replace(place, bucket=replace(bucket, **dict.fromkeys(names, near_size))))
    return [*near, *(there for here in near for there in _on_siblings(here, gpu))]


def places_read(place: Place, gpu: Gpu) -> list[Place]:
    """All places whose records the ranking of a place reads."""
    return [place, *sibling_places(place, gpu), *_last_places(place, gpu)]


def _last_places(place: Place, gpu: Gpu) -> list[Place]:
    """Places whose records are ranked behind all of a place and of its `sibling_places`."""
    siblings_there = [] if op_of(place.spec).uses_sibling_records else _on_siblings(place, gpu)
    return [*siblings_there, *near_places(place, gpu)]


def _supporting(records: Sequence[Result], default: KernelConfig) -> list[Result]:
    """The default's record in a search, if others were tried and it is hardly slower than the fastest.

    records  of the search, from fast to slow
    """
    if len(records) <= FEWEST_RIVALS:
        return []
    return [r for r in records if r.config == default and _time(r) <= MOST_LOSS * _time(records[0])]


def comparable_here(evidence: Evidence, here: Toolchain | None = None) -> bool:
    """Whether a process with the toolchain `here`, by default this one, would compile and time a kernel alike."""
    return evidence.toolchain.compiles_like(here or Toolchain.here()) and evidence.protocol == PROTOCOL


def _tried_here(results: Iterable[Result], here: Toolchain | None) -> list[Result]:
    """The results of a place that a process with the toolchain `here`, by default this one, would reproduce."""
    return [result for result in results if result.informative and comparable_here(result.evidence, here)]


def _overruling(record: Result, tried_here: Iterable[Result], gpu: Gpu) -> Result | None:
    """The result with this toolchain that overrules a record of the same config: a failure, or a newer time; or None.

    tried_here  the results of the place with this toolchain. Nothing is rendered if none of them has the config
    """
    newest: Result | None = None
    same_config = [result for result in tried_here if result.config == record.config]
    if same_config in ([], [record]):
        return None
    for result in same_config:
        if (newest is None or supersedes(result, newest)) and is_rendered(result, gpu):
            newest = result
    if newest is not None and (not newest.measured or (record in same_config and record != newest)):
        return newest
    return None


def _sibling_searches(place: Place, gpu: Gpu, memory: RecordSource, here: Toolchain | None) -> list[_SearchRecords]:
    """The searches on sibling cards that are usable at a place, those with the same toolchain first."""
    default = default_of(place, gpu)
    searches = [s for sibling in sibling_places(place, gpu) for s in _searches(memory.results(sibling), here)]
    usable = (search for search in searches if not search.unknown_knob(default))
    return sorted(usable, key=lambda search: search.matches_here, reverse=True)


def _why_skipped(
    search: _SearchRecords, default: KernelConfig, sibling_searches: Iterable[_SearchRecords], gpu: Gpu
) -> str:
    """Why a place skips the records of one of its searches, though their kernels are still rendered; "" if it does not.

    sibling_searches  the searches on sibling cards
    """
    if unknown := search.unknown_knob(default):
        return f"its search did not try {unknown}, which today's default has"
    for sibling_search in sibling_searches:
        rival = sibling_search.best(gpu) if sibling_search.newest > search.newest else None
        if rival is not None and (unknown := search.unknown_knob(rival.config)):
            return f"its search did not try {unknown}, which the best of a newer search on {rival.place.gpu} has"
    return ""


def why_not_chosen(record: Result, gpu: Gpu, memory: RecordSource, here: Toolchain | None = None) -> str:
    """Why a measured record of a valid kernel that is still rendered is not used at its own place; "" if it is."""
    results = memory.results(record.place)
    overruling = _overruling(record, _tried_here(results, here), gpu)
    if overruling is not None and not overruling.measured:
        return f"its kernel failed here: {overruling.outcome}"
    if overruling is not None:
        return f"its kernel was timed again: {overruling.time_us} us, {overruling.created_at}"
    sibling_searches = _sibling_searches(record.place, gpu, memory, here)
    search = next(search for search in _searches(results, here) if record in search.measured)
    return _why_skipped(search, default_of(record.place, gpu), sibling_searches, gpu)


def sibling_places(place: Place, gpu: Gpu) -> list[Place]:
    """The place on each sibling card, if measurements put its records ahead of the default: for all ops but preprocess.

    Empty for a card that is not in the table, for which `gpu` stands in (descriptions.card_of).
    """
    return _on_siblings(place, gpu) if op_of(place.spec).uses_sibling_records else []


def _on_siblings(place: Place, gpu: Gpu) -> list[Place]:
    return [replace(place, gpu=name) for name in siblings(gpu)] if gpu.name == place.gpu else []


def siblings(gpu: Gpu) -> list[str]:
    """The names of the other cards of the same capability, which run the same programs at a similar speed."""
    return [card.name for card in GPUS.values() if card.arch == gpu.arch and card.name != gpu.name]


def is_valid(result: Result, gpu: Gpu) -> bool:
    """Whether a result's config is valid at its place on a card. Renders nothing."""
    return why_invalid(result.place.spec, result.config, gpu) is None


def is_rendered(result: Result, gpu: Gpu) -> bool:
    """Whether today's templates still render the kernel of a result for a card."""
    place, evidence = result.place, result.evidence
    if evidence.templates or not is_valid(result, gpu):  # none from before fingerprints is rendered any more
        return False
    if text_hash_of(place.spec, result.config, gpu) == evidence.text:
        return True  # equal texts need not be parsed
    return render(place.spec, result.config, gpu).kernel == evidence.kernel


def is_current(result: Result, gpu: Gpu) -> bool:
    """Whether a result of any outcome has today's kernel, this process's toolchain and today's timing protocol."""
    return comparable_here(result.evidence) and is_rendered(result, gpu)


def representative_records(record: Result, memory: RecordSource) -> list[Result]:
    """A record, and the fewest other records of its search that show which knobs the search knew and how new it is."""
    search = next(search for search in _searches(memory.results(record.place)) if record in search.measured)
    representatives = [record, max(search.measured, key=lambda result: result.created_at)]
    for knob in _added_knobs(record.config):
        for result in search.tried:
            value = getattr(result.config, knob.name)
            if value != knob.default and all(getattr(other.config, knob.name) != value for other in representatives):
                representatives.append(result)
    return representatives


def evidence_of(source: KernelSource) -> Evidence:
    """The evidence for a kernel that this process measures."""
    return Evidence.here(source.kernel, source.text_hash)


@dataclass(frozen=True)
class _SearchRecords:
    """The results of one place, toolchain and timing protocol: what one search tried.

    measured  from fast to slow
    tried     failures too
    here      the toolchain that compiles a call's kernel
    """

    measured: list[Result]
    tried: list[Result]
    here: Toolchain

    @cached_property
    def matches_here(self) -> bool:
        """Whether the toolchain `here` would compile and time the same way."""
        return comparable_here(self.measured[0].evidence, self.here)

    @cached_property
    def newest(self) -> str:
        return max(result.created_at for result in self.measured)

    def best(self, gpu: Gpu) -> Result | None:
        """The fastest record whose kernel is still rendered."""
        return next((result for result in self.measured if is_rendered(result, gpu)), None)

    def unknown_knob(self, rival: KernelConfig) -> str:
        """A knob value of another config that this search did not know, `SOFTMAX=fixed_reference`; "" if it knew all.

        A search did not know an added knob if the rival's value is not the knob's default and no tried config has it.
        """
        for knob in _added_knobs(rival):
            value = getattr(rival, knob.name)
            if value != knob.default and all(getattr(result.config, knob.name) != value for result in self.tried):
                return f"{knob.name}={value}"
        return ""


def _added_knobs(config: KernelConfig) -> list[Field[Any]]:
    """The knobs that were added after the first records: earlier configs have their default values."""
    return [f for f in fields(config) if f.default is not MISSING]


def _search_key(result: Result) -> tuple[str, str, int]:
    return result.evidence.triton, result.evidence.cuda, result.evidence.protocol


def _searches(results: Iterable[Result], here: Toolchain | None = None) -> list[_SearchRecords]:
    """Searches with a measured result, by toolchain and protocol: those that match `here` first, then the newest."""
    tried: dict[tuple[str, str, int], list[Result]] = {}
    for result in results:
        if result.informative:
            tried.setdefault(_search_key(result), []).append(result)
    here = here or Toolchain.here()
    searches = [_SearchRecords(measured, group, here) for group in tried.values() if (measured := fastest(group))]
    return sorted(searches, key=lambda search: (search.matches_here, search.newest), reverse=True)


def fastest(results: Iterable[Result]) -> list[Result]:
    """The measured results, from fast to slow; ties keep their order."""
    return sorted((result for result in results if result.measured), key=_time)


def _time(result: Result) -> float:
    return result.time_us or 0.0


# -- Where the ranking looks up records: a Memory, or a table of records taken from it.


class RecordSource(Protocol):
    """Looks up the records of a place."""

    def results(self, place: Place) -> list[Result]:
        """All results of a place, of any kernel and toolchain: the measured ones first, from fast to slow."""


class RecordTable:
    """Records held in memory, such as a subset of a Memory's, or those that several processes share."""

    def __init__(self, records: Iterable[Result]) -> None:
        self._records: dict[Place, list[Result]] = {}
        for record in records:
            self._records.setdefault(record.place, []).append(record)

    def results(self, place: Place) -> list[Result]:
        return self._records.get(place, [])
