"""The report's data, computed from the memory and the bench files, and its JSON form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import Any

import parallax_gen
from parallax_gen.bench.rows import Row
from parallax_gen.bench.summary import LargestErrors, Mean, largest_errors, means, times_ours
from parallax_gen.memory.descriptions import Origins, borrowed_places, name_in_records
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable
from parallax_gen.memory.result import Outcome
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.toolchain import triton_version
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.report.entries import Entry, by_place, entries_of, most_useful
from parallax_gen.report.failures import Reason, reasons
from parallax_gen.report.published import Published, published
from parallax_gen.report.tiers import TierCount, tiers_of
from parallax_gen.tuning.search.importances import MIN_TRIALS, importances


@dataclass(frozen=True)
class Kernel:
    """The shown entries of one kernel on one GPU."""

    gpu: str
    spec: KernelSpec
    entries: tuple[Entry, ...]

    @property
    def buckets(self) -> int:
        return len({entry.place.bucket for entry in self.entries})

    @property
    def percents(self) -> str:
        """The range of percentages of the roofline bound that its entries reach: `36 to 54`, `45`; "" if unknown."""
        fractions = [entry.fraction_of_bound for entry in self.entries if entry.fraction_of_bound is not None]
        ends = [f"{100 * end:.0f}" for end in (min(fractions), max(fractions))] if fractions else []
        return " to ".join(dict.fromkeys(ends))

    @property
    def outcomes(self) -> Counter[Outcome]:
        """The outcomes of the user's own trials."""
        return Counter(trial.outcome for entry in self.entries for trial in entry.trials)

    @property
    def tried(self) -> bool:
        """Whether the user has run configs of this kernel. Predictions do not count."""
        return any(outcome.tried for outcome in self.outcomes)

    def has_any(self, keys: Container[object]) -> bool:
        return any(entry.key in keys for entry in self.entries)

    @property
    def reasons(self) -> list[Reason]:
        return reasons(trial for entry in self.entries for trial in entry.trials)

    @property
    def costs(self) -> list[tuple[KernelConfig, float]]:
        """The user's own timed trials as (config, time relative to the best of its entry)."""
        costs = []
        for entry in self.entries:
            timed = [(trial.config, trial.time_us) for trial in entry.trials if trial.outcome.timed]
            times = [(config, time_us) for config, time_us in timed if time_us]
            fastest = min((time_us for _, time_us in times), default=0.0)
            costs += [(config, time_us / fastest) for config, time_us in times if len(times) > 1]
        return costs

    @property
    def importances(self) -> dict[str, float]:
        """The importance of each knob; empty if there are too few trials."""
        return importances(self.spec, self.costs)


@dataclass(frozen=True)
class Card:
    """The best of today's kernels on a card with this toolchain.

    fraction  the median fraction of the roofline bound; None if none was measured or the card's peaks are unknown
    gain      the geometric mean of the gains over the default; None if no place has both times
    gains     the number of places that have both
    """

    fraction: float | None
    gain: float | None
    gains: int

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Card:
        here = [entry for entry in entries if entry.state == "measured"]
        fractions = [entry.fraction_of_bound for entry in here if entry.fraction_of_bound is not None]
        gains = [entry.gain for entry in here if entry.gain is not None]
        return cls(median(fractions) if fractions else None, geometric_mean(gains) if gains else None, len(gains))


@dataclass(frozen=True)
class Bar:
    """A baseline's mean time relative to ours."""

    baseline: str
    ratio: Mean


@dataclass(frozen=True)
class Comparison:
    """The baselines of one op on one card.

    conditions  of published times: versions and date; "" for those of a bench file
    changed     whether "all" or "some" of them are of a kernel that has changed since; "" if none is
    """

    gpu: str
    op: str
    bars: tuple[Bar, ...]
    conditions: str
    changed: str = ""


@dataclass(frozen=True)
class Report:
    """The data of the page.

    gpus      the names of the cards
    shown     the entries on the page, sorted by place
    left_out  the number of entries of other toolchains and kernels that are not shown
    by_place  every place that could be tuned, with its most informative entry
    tiers     by card: on what evidence the kernels of these places rest, and what to run
    published comparisons with other kernels that ship with the package
    ratios    other baselines' rows in the bench files, with their time relative to ours
    errors    the largest errors of the rows in the bench files, ours too, by card, op, part and baseline
    benches   the bench files as (file name, conditions, command)
    """

    gpus: tuple[str, ...]
    shown: tuple[Entry, ...]
    left_out: int
    by_place: dict[Place, Entry | None]
    tiers: dict[str, tuple[TierCount, ...]]
    published: tuple[Published, ...]
    ratios: list[tuple[Row, float | None]]
    errors: dict[tuple[str, str, str, str], LargestErrors]
    benches: tuple[tuple[str, str, str], ...]

    @property
    def kernels(self) -> list[Kernel]:
        """The kernels with shown entries, in the order of `by_place`: op by op."""
        by_kernel: dict[tuple[str, KernelSpec], list[Entry]] = {}
        for entry in self.shown:
            by_kernel.setdefault((entry.place.gpu, entry.place.spec), []).append(entry)
        order = dict.fromkeys((place.gpu, place.spec) for place in self.by_place)
        return [Kernel(gpu, spec, tuple(by_kernel[gpu, spec])) for gpu, spec in order if (gpu, spec) in by_kernel]

    @property
    def newest(self) -> str:
        """The time of the newest shown result, ISO 8601 in UTC; "" if there is none."""
        return max((entry.newest for entry in self.shown), default="")

    @property
    def means(self) -> dict[tuple[str, str, str, str], Mean]:
        """Mean times relative to ours by card, op, part and baseline, over all shapes where both ran."""
        return means(self.ratios, _part_of_baseline)

    @property
    def cards(self) -> dict[str, Card]:
        """How fast the best kernels of each card are, over all ops."""
        return {gpu: Card.of([e for place, e in self.by_place.items() if e and place.gpu == gpu]) for gpu in self.tiers}

    @property
    def comparisons(self) -> list[Comparison]:
        """The mean times of other kernels by card and op: from the bench files, else the published ones, by Triton."""
        bars: dict[tuple[str, str], list[Bar]] = {}
        for (gpu, op, part, baseline), mean in self.means.items():
            if part in (op, "step"):  # a step's parts are in the section below
                bars.setdefault((gpu, op), []).append(Bar(baseline, mean))
        measured = [Comparison(gpu, op, tuple(of), "") for (gpu, op), of in bars.items()]
        groups: dict[tuple[str, str, str], list[Published]] = {}
        for row in self.published:
            if (row.gpu, row.op) not in bars:
                groups.setdefault((row.gpu, row.op, row.conditions), []).append(row)
        return measured + [
            Comparison(gpu, op, tuple(Bar(r.baseline, r.ratio) for r in rows), conditions, _changed(rows))
            for (gpu, op, conditions), rows in groups.items()
        ]

    def summary(self) -> dict[str, dict[str, tuple[Counter[str], float | None]]]:
        """By op and GPU: how many buckets are in each state, and the median fraction of the bound of measured ones."""
        by_op: dict[str, dict[str, tuple[Counter[str], list[float]]]] = {}
        for place, entry in self.by_place.items():
            states, fractions = by_op.setdefault(place.spec.public_op, {}).setdefault(place.gpu, (Counter(), []))
            states[entry.state if entry else "untuned"] += 1
            if entry is not None and entry.fraction_of_bound is not None:
                fractions.append(entry.fraction_of_bound)
        return {
            op: {gpu: (states, median(fractions) if fractions else None) for gpu, (states, fractions) in by_gpu.items()}
            for op, by_gpu in by_op.items()
        }


def _changed(rows: Sequence[Published]) -> str:
    changed = {row.changed for row in rows}
    return changed.pop() if len(changed) == 1 else "some"


def _part_of_baseline(row: Row) -> tuple[str, str, str, str]:
    return row.provenance.gpu, row.op, row.part, row.baseline


def collect(memory: Memory, gpus: Sequence[str], rows: list[Row], *, all_environments: bool) -> Report:
    """The report on the named GPUs, or on all.

    all_environments  show all toolchains and kernels, not only the most useful ones

    Raises UnknownGpuError for an unknown GPU.
    """
    results = memory.all()
    requested = tuple(dict.fromkeys(name_in_records(gpu, results) for gpu in gpus))
    entries = entries_of(memory, (r for r in results if not requested or r.place.gpu in requested))
    shown = entries if all_environments else most_useful(entries)
    names = requested or tuple(sorted({entry.place.gpu for entry in entries}))
    selected = [row for row in rows if not requested or row.provenance.gpu in (*requested, "")]
    borrowed = [place for name in names for place in borrowed_places(name, results)]
    by_op = sorted(selected, key=lambda row: (row.provenance.gpu, row.op))
    return Report(
        gpus=names,
        shown=tuple(shown),
        left_out=len(entries) - len(shown),
        by_place=(places := by_place(shown, names)),
        tiers=tiers_of(dict.fromkeys((*places, *borrowed)), RecordTable(results)),
        published=tuple(published(names)),
        ratios=times_ours(by_op),
        errors=largest_errors(by_op, _part_of_baseline),
        benches=tuple(
            dict.fromkeys((row.provenance.file, row.provenance.conditions, row.provenance.command) for row in selected)
        ),
    )


def to_json(report: Report, memory: Memory) -> dict[str, Any]:
    """All data of the page except the trials, which `parallax-gen list --all --json` prints."""
    origins = Origins(memory)
    return {
        "parallax_gen": parallax_gen.__version__,
        "triton": triton_version(),
        "gpus": report.gpus,
        "newest": report.newest,
        "left_out": report.left_out,
        "entries": [
            {
                "place": entry.place.flat(),
                "state": entry.state,
                "unlike_here": entry.differences,
                "outcomes": entry.outcomes,
                "trials": len(entry.trials),
                "share_of_bound": entry.fraction_of_bound,
                "default_us": entry.default and entry.default.time_us,
                "gain": entry.gain,
                "best": origins.to_json(entry.best) if entry.best else None,
            }
            for entry in report.shown
        ],
        "tiers": [
            {
                "gpu": gpu,
                "tier": count.tier.text,
                "places": count.places,
                "not_yet_checked": count.unchecked,
                "commands": count.commands,
                "without_command": count.left_out,
            }
            for gpu, counts in report.tiers.items()
            for count in counts
        ],
        "published": [
            {"gpu": row.gpu, "op": row.op, "baseline": row.baseline, **row.ratio._asdict()}
            | {"conditions": row.conditions, "kernel_changed": row.changed}
            for row in report.published
        ],
        "untuned": [
            {"gpu": place.gpu, "spec": place.spec.to_dict(), "bucket": place.bucket.to_dict()}
            for place, entry in report.by_place.items()
            if entry is None
        ],
        "kernels": [
            {
                "gpu": kernel.gpu,
                "spec": kernel.spec.to_dict(),
                "outcomes": kernel.outcomes,
                "importances": kernel.importances,
                "reasons": [vars(reason) for reason in kernel.reasons],
            }
            for kernel in report.kernels
        ],
        "least_trials": MIN_TRIALS,
        "times_ours": [
            {"gpu": gpu, "op": op, "part": part, "baseline": baseline, "mean": mean, "least": least, "shapes": count}
            for (gpu, op, part, baseline), (mean, least, count) in report.means.items()
        ],
        "largest_errors": [
            {"gpu": gpu, "op": op, "part": part, "baseline": baseline, "error": usual, "peaked_error": peaked}
            for (gpu, op, part, baseline), (usual, peaked) in report.errors.items()
        ],
    }
