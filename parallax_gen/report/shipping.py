"""`parallax-gen ship --check`: where shipped records may be slower than the default config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parallax_gen.describe import gain_text, number
from parallax_gen.memory.gains import Comparison, comparisons_of
from parallax_gen.memory.result import Result
from parallax_gen.memory.toolchain import minor
from parallax_gen.problem.hardware import Gpu
from parallax_gen.tables import Table

NO_DEFAULT, SLOWER = "no time of the default", "slower than the default"


@dataclass(frozen=True)
class CheckedCard:
    """The check of a card's shipped records.

    places    how many kernels and buckets have records
    current   how many of them have records of today's kernels
    findings  each place and toolchain with a problem, and the problem
    """

    name: str
    places: int
    current: int
    findings: list[tuple[Comparison, str]]

    @property
    def counts(self) -> dict[str, int]:
        counts = Counter(finding for _, finding in self.findings)
        return {finding: counts[finding] for finding in (NO_DEFAULT, SLOWER)}

    @property
    def summary(self) -> str:
        counts = ", ".join(f"{count} {finding}" for finding, count in self.counts.items())
        places = f"{self.places} kernels and sizes, {self.current} of them with records of today's kernels"
        return f"{self.name}: {places}: {counts}"

    def table(self) -> Table:
        numbers = ("best us", "default us", "gain")
        lines = [_line(comparison) for comparison, _ in self.findings]
        return Table("", (*numbers, "measured with", self.name), lines, numbers)

    def to_json(self) -> dict[str, Any]:
        counts = {finding.replace(" ", "_"): count for finding, count in self.counts.items()}
        listed = [
            {
                "finding": finding,
                "best": comparison.chosen.to_dict(),
                "default_us": comparison.default and comparison.default.time_us,
                "gain": comparison.gain,
            }
            for comparison, finding in self.findings
        ]
        sizes = {"places": self.places, "of_todays_kernels": self.current}
        return {"gpu": self.name, **sizes, **counts, "findings": listed}


def check_card(name: str, records: Sequence[Result], gpu: Gpu) -> CheckedCard:
    """The check of a card's records, which are sorted by place."""
    comparisons = comparisons_of(records, gpu)
    findings = [(comparison, finding) for comparison in comparisons if (finding := _finding(comparison))]
    return CheckedCard(name, len({r.place for r in records}), len({c.place for c in comparisons}), findings)


def _finding(comparison: Comparison) -> str:
    """The problem of a place's records; "" if there is none."""
    return NO_DEFAULT if comparison.default is None else SLOWER if comparison.is_slower_than_default else ""


def _line(comparison: Comparison) -> tuple[str, ...]:
    best, default, place = comparison.chosen, comparison.default, comparison.place
    times = (number(r.time_us) if r is not None and r.time_us else "-" for r in (best, default))
    kernel_and_bucket = f"{place.spec}; {place.bucket}"
    return *times, gain_text(comparison.gain), f"Triton {minor(best.evidence.triton)}", kernel_and_bucket
