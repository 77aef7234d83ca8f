"""The report's entries: the results of one kernel in one bucket on one GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from parallax_gen.codegen.device import card_named
from parallax_gen.memory.descriptions import ANOTHER_KERNEL, Origins, card_of, differences_from_here, shape_of
from parallax_gen.memory.gains import gain
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, comparable_default, default_of
from parallax_gen.memory.result import Outcome, Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.problem.hardware import MIB, Gpu
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import PUBLIC_OPS, KernelSpec
from parallax_gen.problem.work import bound_us, rate, work_of
from parallax_gen.tuning.job import worklist

# The states of a bucket, best first.
STATES = ("measured", "elsewhere", "predicted", "failed", "untuned")


@dataclass(frozen=True)
class Entry:
    """Results of one kernel in one bucket on one GPU that match this process, or all differ from it in the same way.

    gpu          the card; None if it is neither in the table nor in this machine
    results      measured ones from fast to slow, then predicted, then failed ones
    trials       the user's own results, in the order of their first trial
    differences  the differences from this process, as text: toolchain, kernel; empty if there are none
    status       of the first result: measured (by the user), shipped, predicted, or how it failed
    default      the comparable result of today's default config; None if there is none, or the best has another kernel
    """

    place: Place
    gpu: Gpu | None
    results: tuple[Result, ...]
    trials: tuple[Result, ...]
    differences: tuple[str, ...]
    status: str
    default: Result | None = None

    @property
    def key(self) -> tuple[Place, tuple[str, ...]]:
        """Identifies the entry."""
        return self.place, self.differences

    @property
    def best(self) -> Result | None:
        return self.results[0] if self.results[0].measured else None

    @property
    def state(self) -> str:
        """One of STATES. "elsewhere": measured with another toolchain, or of another kernel than today's."""
        if self.best is not None:
            return "elsewhere" if self.differences else "measured"
        return "predicted" if self.results[0].outcome is Outcome.PREDICTED else "failed"

    @property
    def outcomes(self) -> Counter[Outcome]:
        return Counter(result.outcome for result in self.results)

    @property
    def newest(self) -> str:
        return max(result.created_at for result in self.results)

    @property
    def rate(self) -> float | None:
        """The best result's rate, in `problem.work.rate_unit`."""
        time_us = self.best and self.best.time_us
        return rate(self.place.spec, shape_of(self.results[0]), time_us) if time_us else None

    @property
    def gain(self) -> float | None:
        """The default's time divided by the best's."""
        return gain(self.results[0], self.default)

    @property
    def fraction_of_bound(self) -> float | None:
        """The fraction of the roofline bound that the best reaches; None if the card's peaks are unknown."""
        if self.best is None or self.best.time_us is None or self.gpu is None:
            return None
        return bound_us(self.place.spec, shape_of(self.best), self.gpu) / self.best.time_us

    @property
    def bytes(self) -> float:
        """The memory traffic of a call that reads each input and writes each output once."""
        return work_of(self.place.spec, shape_of(self.results[0])).bytes

    @property
    def is_above_bound(self) -> bool:
        """Whether the best takes less time than the roofline bound."""
        return self.fraction_of_bound is not None and self.fraction_of_bound > 1

    @property
    def fits_l2(self) -> bool:
        """Whether all that a call reads and writes fits the card's L2, where repeated calls find it."""
        return self.gpu is not None and self.bytes <= self.gpu.l2_bytes

    @property
    def above_bound_note(self) -> str:
        """Why the best is faster than the bound; "" if it is not."""
        if self.gpu is None or not self.is_above_bound:
            return ""
        size, l2 = f"{self.bytes / MIB:.0f} MiB", f"the L2 of {self.gpu.l2_bytes / MIB:.0f} MiB"
        if self.fits_l2:
            return f"faster than the bound: its {size} fit {l2}, which repeated calls read instead of memory"
        return f"faster than the bound, which L2 does not explain: its {size} exceed {l2}"


def entries_of(memory: Memory, results: Iterable[Result]) -> list[Entry]:
    """Group results, sorted by place, into entries sorted by place."""
    origins = Origins(memory)
    trials: dict[Result, int] = {
        trial: i for i, trial in enumerate(memory.store.in_trial_order() if memory.store else ())
    }
    entries = []
    for place, group in groupby(results, key=lambda r: r.place):
        by_difference: dict[tuple[str, ...], list[Result]] = {}
        for result in group:
            by_difference.setdefault(differences_from_here(result), []).append(result)
        for differences, entry_results in by_difference.items():
            own_trials = sorted((r for r in entry_results if r in trials), key=trials.__getitem__)
            entries.append(
                Entry(
                    place=place,
                    gpu=card_named(place.gpu),
                    results=tuple(entry_results),
                    trials=tuple(own_trials),
                    differences=differences,
                    status=origins.status(entry_results[0]),
                    default=_default(entry_results, differences),
                )
            )
    return entries


def _default(results: list[Result], differences: tuple[str, ...]) -> Result | None:
    best = results[0]
    if not best.measured or ANOTHER_KERNEL in differences:
        return None
    card = card_of(best.place)
    return comparable_default(best, default_of(best.place, card), card, RecordTable(results))


def most_useful(entries: Iterable[Entry]) -> list[Entry]:
    """For each place the entry that matches this process and, if that has no measurement, the best other entry.

    The best other entry is the newest measured one, else the newest.
    """
    chosen: list[Entry] = []
    for _, group in groupby(entries, key=lambda entry: entry.place):  # input is sorted by place
        place_entries = list(group)
        here = [entry for entry in place_entries if not entry.differences]
        elsewhere = sorted((e for e in place_entries if e.differences), key=lambda e: (e.best is not None, e.newest))
        chosen += here
        if elsewhere and not any(entry.best for entry in here):
            chosen.append(elsewhere[-1])
    return chosen


def by_place(entries: Iterable[Entry], gpus: Sequence[str]) -> dict[Place, Entry | None]:
    """Every place that could be tuned, op by op, with its most informative entry, or None.

    These are the places of the default jobs of `parallax-gen tune`, and every kernel and bucket tried on any of the
    GPUs.
    """
    best: dict[Place, Entry | None] = {}
    tried: dict[tuple[KernelSpec, Bucket], None] = {}
    for entry in entries:
        tried[entry.place.spec, entry.place.bucket] = None
        previous = best.get(entry.place)
        if previous is None or _informativeness(entry) > _informativeness(previous):
            best[entry.place] = entry
    for gpu in gpus:
        card = card_named(gpu)
        default_jobs = [(job.spec, job.bucket) for job in worklist(card)] if card else []
        for spec, bucket in (*default_jobs, *tried):
            best.setdefault(Place(gpu, spec, bucket), None)
    return dict(sorted(best.items(), key=lambda item: _order(item[0])))


def _informativeness(entry: Entry) -> tuple[int, str]:
    """Sort key of informativeness: the state, then the date."""
    return -STATES.index(entry.state), entry.newest


def _order(place: Place) -> tuple[object, ...]:
    spec, bucket = place.spec, place.bucket
    return (
        PUBLIC_OPS.index(spec.public_op),
        place.gpu,
        *order_of(spec),
        bucket.kv_rows,
        bucket.seqlen_q,
        bucket.seqlen_kv,
        bucket.window,
    )


def order_of(spec: KernelSpec) -> tuple[object, ...]:
    """The sort key of an op's kernels."""
    return spec.head_dim, spec.dtype, spec.group, str(spec)
