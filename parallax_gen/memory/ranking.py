"""The only ranker: which config a call gets, of all that is known, for dispatch, tuner, export and reports alike.

Evidence is of a program: a record counts where today's templates still render the kernel that was measured, whatever
has compiled it. Tiers, the best first:

1. measured here: the same GPU, kernel and toolchain
2. other toolchain: the same GPU and kernel, compiled by another Triton or ptxas
3. sibling card: the same kernel on another GPU of the same capability, such as an H100's on an H200; but for
   preprocess, which moves rows at the speed of its own card's memory
4. neighbour: the same kernel at a near bucket, along keys before rows; of decode of equal lengths alone, where evidence
   (docs/borrowing.md) has it ahead of the default
5. default: the heuristics

Within a tier the same toolchain goes first, then the newest; times are compared where one card took them with one
toolchain. Records of a search from before a knob that today's default has, or that a sibling's newer best has, are
passed over: what they won against did not have it. Records whose kernel is no longer rendered are hints for the tuner,
and never a choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, Protocol, TypeVar

from parallax_gen.codegen.render import KernelSource, render, text_hash_of
from parallax_gen.memory.old import same_programs
from parallax_gen.memory.place import Place
from parallax_gen.memory.result import PROTOCOL, Evidence, Result, supersedes
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.ops.space import default_config, why_invalid
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.shapes import SHORTEST, Bucket, representative
from parallax_gen.problem.spec import KernelSpec


class Tier(IntEnum):
    """How near the evidence for a choice is to a measurement of it."""

    MEASURED_HERE = 1
    OTHER_TOOLCHAIN = 2
    SIBLING_CARD = 3
    NEIGHBOUR = 4
    DEFAULT = 5

    @property
    def words(self) -> str:
        words = ("measured here", "another toolchain", "a sibling card", "a near bucket", "the default")
        return dict(zip(Tier, words, strict=True))[self]


@dataclass(frozen=True)
class Candidate:
    """A config, and the record that speaks for it: None of the default."""

    tier: Tier
    config: KernelConfig
    record: Result | None


def ranked(place: Place, gpu: Gpu, known: Known, here: Toolchain | None = None) -> Iterator[Candidate]:
    """What a call at a place can get, the best first; the default is the last. Renders no more than is asked for.

    gpu   the card that the place's name stands for
    here  the toolchain that would compile it: by default this process's
    """
    default = default_of(place, gpu)
    results = known.results(place)
    found_here = _found_here(results, here)

    def stands(record: Result) -> bool:
        return is_rendered(record, gpu) and _overruling(record, found_here, gpu) is None

    others = _of_siblings(place, gpu, known, here)
    for search in _searches(results, here):
        if not _why_passed_over(search, default, others, gpu):
            tier = Tier.MEASURED_HERE if search.like_here else Tier.OTHER_TOOLCHAIN
            yield from (Candidate(tier, r.config, r) for r in search.measured if stands(r))
    for search in others:
        yield from (Candidate(Tier.SIBLING_CARD, r.config, r) for r in search.measured if stands(r))
    for near in near_places(place):
        for search in _searches(known.results(near), here):
            record = None if search.unknown(default) else next(filter(stands, search.measured), None)
            if record is not None:
                yield Candidate(Tier.NEIGHBOUR, record.config, record)
    yield Candidate(Tier.DEFAULT, default, None)


def best(place: Place, gpu: Gpu, known: Known, here: Toolchain | None = None) -> Candidate:
    """What a call at a place gets; `here` as of `ranked`."""
    return next(ranked(place, gpu, known, here))


def default_beside(record: Result, default: KernelConfig, gpu: Gpu, known: Known) -> Result | None:
    """The default's own record of a record's place, timed as that was, of today's kernel; None where there is none.

    default  today's default config of the call, at the record's place or at a sibling card's
    gpu      the record's card
    """
    timed = [
        result
        for result in known.results(record.place)
        if result.config == default and result.measured and timed_alike(result.evidence, record.evidence)
    ]
    timed.sort(key=lambda result: (_search_of(result) == _search_of(record), result.created), reverse=True)
    return next((result for result in timed if is_rendered(result, gpu)), None)


def timed_alike(one: Evidence, other: Evidence) -> bool:
    """Whether times of one card may be compared: the same toolchain, as far as programs go, and the same protocol."""
    same = one.toolchain == other.toolchain or one.toolchain.like(other.toolchain)
    return same and one.protocol == other.protocol


def default_of(place: Place, gpu: Gpu) -> KernelConfig:
    """What a call at a place gets where nothing is known."""
    return default_config(place.spec, representative(place.bucket, place.spec.group), gpu)


def near_buckets(place: Place) -> Iterator[Place]:
    """The same kernel at near sizes, the nearest first: along keys before rows, the smaller before the larger."""
    bucket = place.bucket
    lengths = ("seqlen_q", "seqlen_kv") if bucket.seqlen_q == bucket.seqlen_kv else ("seqlen_kv",)
    for names, least, factor in ((lengths, SHORTEST, 2), (lengths, SHORTEST, 4), (("kv_rows",), 1, 2)):
        size = getattr(bucket, names[0])
        for near in (size // factor, size * factor):
            if near >= least:
                yield replace(place, bucket=replace(bucket, **dict.fromkeys(names, near)))


def is_like(evidence: Evidence, here: Toolchain | None = None) -> bool:
    """Whether this process, or that of the toolchain `here`, would compile and time alike."""
    return evidence.toolchain.like(here or Toolchain.here()) and evidence.protocol == PROTOCOL


def _found_here(results: Iterable[Result], here: Toolchain | None) -> list[Result]:
    """Of a place's results those that this process, or that of the toolchain `here`, would find alike."""
    return [result for result in results if result.counts and is_like(result.evidence, here)]


def _overruling(record: Result, found_here: Iterable[Result], gpu: Gpu) -> Result | None:
    """What was found of a record's config here and says otherwise: that it failed, or another time since.

    found_here  what was tried at the place with this toolchain. Nothing is rendered where none is of the config
    """
    verdict: Result | None = None
    of_config = [result for result in found_here if result.config == record.config]
    if of_config in ([], [record]):
        return None
    for result in of_config:
        if (verdict is None or supersedes(result, verdict)) and is_rendered(result, gpu):
            verdict = result
    if verdict is not None and (not verdict.measured or (record in of_config and record != verdict)):
        return verdict
    return None


def _of_siblings(place: Place, gpu: Gpu, known: Known, here: Toolchain | None) -> list[_Search]:
    """The searches on cards alike that count at a place: those with the same toolchain first."""
    default = default_of(place, gpu)
    searches = [s for where in sibling_places(place, gpu) for s in _searches(known.results(where), here)]
    counting = (search for search in searches if not search.unknown(default))
    return sorted(counting, key=lambda search: search.like_here, reverse=True)


def _why_passed_over(search: _Search, default: KernelConfig, others: Iterable[_Search], gpu: Gpu) -> str:
    """Why none of a place's search counts there, though its kernels are rendered; "" where they do.

    others  the searches on cards alike
    """
    if unknown := search.unknown(default):
        return f"its search did not try {unknown}, which today's default has"
    for other in others:
        rival = other.best(gpu) if other.newest > search.newest else None
        if rival is not None and (unknown := search.unknown(rival.config)):
            return f"its search did not try {unknown}, which the best of a newer search on {rival.place.gpu} has"
    return ""


def why_not_chosen(record: Result, gpu: Gpu, known: Known, here: Toolchain | None = None) -> str:
    """Why a measured record of a valid kernel that is still rendered is no choice at its own place; "" where it is."""
    results = known.results(record.place)
    verdict = _overruling(record, _found_here(results, here), gpu)
    if verdict is not None and not verdict.measured:
        return f"its kernel failed here: {verdict.outcome}"
    if verdict is not None:
        return f"its kernel was timed again: {verdict.time_us} us, {verdict.created_at}"
    others = _of_siblings(record.place, gpu, known, here)
    search = next(search for search in _searches(results, here) if record in search.measured)
    return _why_passed_over(search, default_of(record.place, gpu), others, gpu)


def sibling_places(place: Place, gpu: Gpu) -> list[Place]:
    """The same on cards alike, where what is fast there is ahead of the default, by evidence: all but preprocess.

    None of a card that `gpu` only stands in for: what that is like is not known.
    """
    alike = siblings(gpu) if gpu.name == place.gpu and op_of(place.spec).sibling_counts else []
    return [replace(place, gpu=name) for name in alike]


def near_places(place: Place) -> list[Place]:
    """The same at near sizes, where what is fast there is ahead of the default, by evidence: decode of equal lengths.

    A place is near to those that are near to it.
    """
    return list(near_buckets(place)) if op_of(place.spec).near_counts else []


def siblings(gpu: Gpu) -> list[str]:
    """Names of the other cards that run the same programs at a like speed."""
    return [other.name for other in GPUS.values() if other.capability == gpu.capability and other.name != gpu.name]


def is_valid(result: Result, gpu: Gpu) -> bool:
    """Whether a result's config can serve its place on a card, which says nothing of what is rendered for it."""
    return why_invalid(result.place.spec, result.config, gpu) is None


def is_rendered(result: Result, gpu: Gpu) -> bool:
    """Whether today's templates render, for a card, the kernel that a result is of."""
    place, evidence = result.place, result.evidence
    if not is_valid(result, gpu):
        return False
    if evidence.templates:
        return same_programs(evidence.templates, place.spec)
    if text_hash_of(place.spec, result.config, gpu) == evidence.text:
        return True  # and nothing has to be parsed
    return render(place.spec, result.config, gpu).kernel == evidence.kernel


def is_current(result: Result, gpu: Gpu) -> bool:
    """Whether a result, of any outcome, is of today's kernel, this process's toolchain and the timing protocol."""
    return is_like(result.evidence) and is_rendered(result, gpu)


def shown_by(record: Result, known: Known) -> list[Result]:
    """A record, and as few others of its search as show what that knew, and how new it is."""
    search = next(search for search in _searches(known.results(record.place)) if record in search.measured)
    shown = [record, max(search.measured, key=lambda result: result.created_at)]
    for f in _later_knobs(record.config):
        for result in search.tried:
            value = getattr(result.config, f.name)
            if value != f.default and all(getattr(other.config, f.name) != value for other in shown):
                shown.append(result)
    return shown


def evidence_of(source: KernelSource) -> Evidence:
    """That of a kernel that this process measures."""
    return Evidence.here(source.kernel, source.text_hash)


@dataclass(frozen=True)
class _Search:
    """What is known of one place by one toolchain and timing protocol.

    measured  fast to slow
    tried     those that failed too, of what counts
    here      the toolchain that a call's kernels are compiled by
    """

    measured: list[Result]
    tried: list[Result]
    here: Toolchain

    @cached_property
    def like_here(self) -> bool:
        """Whether a call's kernels would be compiled and timed alike."""
        return is_like(self.measured[0].evidence, self.here)

    @cached_property
    def newest(self) -> str:
        return max(result.created_at for result in self.measured)

    def best(self, gpu: Gpu) -> Result | None:
        """The fastest of a kernel that is still rendered."""
        return next((result for result in self.measured if is_rendered(result, gpu)), None)

    def unknown(self, rival: KernelConfig) -> str:
        """What another config is made of and this search did not know, such as `ROW_MAX=first`; "" where it knew all.

        Where the rival has another value of a later knob than its default, and nothing that was tried has, the search
        did not know the knob.
        """
        for f in _later_knobs(rival):
            value = getattr(rival, f.name)
            if value != f.default and all(getattr(result.config, f.name) != value for result in self.tried):
                return f"{f.name}={value}"
        return ""


def _later_knobs(config: KernelConfig) -> list[Field[Any]]:
    """Those that came later than records: configs from before them have their default values."""
    return [f for f in fields(config) if f.default is not MISSING]


def _search_of(result: Result) -> tuple[str, str, int]:
    return result.evidence.triton, result.evidence.cuda, result.evidence.protocol


def _searches(results: Iterable[Result], here: Toolchain | None = None) -> list[_Search]:
    """By toolchain and protocol, those that measured anything: those like `here` first, then the newest."""
    tried: dict[tuple[str, str, int], list[Result]] = {}
    for result in results:
        if result.counts:
            tried.setdefault(_search_of(result), []).append(result)
    here = here or Toolchain.here()
    searches = [_Search(measured, group, here) for group in tried.values() if (measured := fastest(group))]
    return sorted(searches, key=lambda search: (search.like_here, search.newest), reverse=True)


# -- By time alone, whatever kernel and toolchain: to begin a tune with, and not to believe.

_Which = TypeVar("_Which", bound=Hashable)
HOW_KEPT = ("page_size", "cache_dtype", "leftpad", "stats")  # of a spec, how a cache is kept and what else is written


def fastest(results: Iterable[Result]) -> list[Result]:
    """The measured ones, from fast to slow; of those as fast the order is kept."""
    return sorted((result for result in results if result.measured), key=_time)


def fastest_of_each(results: Iterable[Result], which: Callable[[Result], _Which]) -> dict[_Which, Result]:
    """The fastest measured one of each kind; kinds, and of those as fast the first, in the order of the results."""
    found: dict[_Which, Result] = {}
    for result in results:
        if result.measured:
            kind = which(result)
            found[kind] = min(found.get(kind, result), result, key=_time)
    return found


def _time(result: Result) -> float:
    return result.time_us or 0.0


def nearest_buckets(bucket: Bucket, others: Iterable[Bucket], *, rows_first: bool = False) -> list[Bucket]:
    """Others, the nearest first, by the ratios of all their sizes, or with rows_first of rows and then the lengths."""

    def distance(other: Bucket) -> tuple[float, float]:
        ratios = {n: abs(math.log2(max(size, 1) / max(getattr(bucket, n), 1))) for n, size in vars(other).items()}
        return ratios.pop("kv_rows") if rows_first else 0.0, sum(ratios.values())

    return sorted(others, key=distance)


def shipped_seeds(place: Place, shipped: Sequence[Result]) -> list[KernelConfig]:
    """Of the records that ship for cards alike (`load_alike`): what was fastest for a place's kernel.

    All of its bucket, then the best there of its kernel with another cache layout, then the best of each other bucket.
    """
    records = [r for r in shipped if r.place.spec == place.spec]
    here = [r.config for r in records if r.place.bucket == place.bucket]
    # A file has each place's fastest first.
    layouts = {r.place: r.config for r in reversed(shipped) if _differs_in_layout(r.place, place)}
    best = {r.place.bucket: r.config for r in reversed(records)}
    return list(dict.fromkeys([*here, *layouts.values(), *best.values()]))


def nearby_seeds(place: Place, known: Sequence[Result]) -> list[KernelConfig]:
    """Of what is known of a card: as `shipped_seeds` of other layouts, then the best of the two nearest buckets."""
    layouts = fastest_of_each((r for r in known if _differs_in_layout(r.place, place)), lambda r: r.place.spec)
    of_kernel = (r for r in known if r.place.spec == place.spec and r.place.bucket != place.bucket)
    best = fastest_of_each(of_kernel, lambda r: r.place.bucket)
    nearest = [best[bucket] for bucket in nearest_buckets(place.bucket, best)[:2]]
    return list(dict.fromkeys(result.config for result in (*layouts.values(), *nearest)))


def _differs_in_layout(one: Place, other: Place) -> bool:
    """Whether two places of decode, of one bucket, differ in no more than HOW_KEPT."""
    names = [f.name for f in fields(KernelSpec) if f.name not in HOW_KEPT]
    same = all(getattr(one.spec, name) == getattr(other.spec, name) for name in names)
    return one.bucket == other.bucket and op_of(one.spec).own_lengths and one.spec != other.spec and same


# -- What the ranking asks for the records of a place: the memory, or a table that was taken from one.


class Known(Protocol):
    """Where records are looked up."""

    def results(self, place: Place) -> list[Result]:
        """All that is known of a place, of any kernel and toolchain: the measured first, from fast to slow."""


class Table:
    """Records with no file behind them: what processes have that must all choose alike."""

    def __init__(self, records: Iterable[Result]) -> None:
        self._records: dict[Place, list[Result]] = {}
        for record in records:
            self._records.setdefault(record.place, []).append(record)

    def results(self, place: Place) -> list[Result]:
        return self._records.get(place, [])
