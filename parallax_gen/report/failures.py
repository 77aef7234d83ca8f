"""Pruned and failed configs, grouped by reason. Reasons that differ only in numbers are merged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from parallax_gen.describe import brief
from parallax_gen.memory.result import Outcome, Result

MAX_EXAMPLES = 3
NUMBER = re.compile(r"\d+(?:\.\d+)?")

# In the order of display: expected failures first, wrong results last.
FAILURES_IN_ORDER = (
    Outcome.SLOW,
    Outcome.RESOURCES,
    Outcome.INVALID,
    Outcome.TIMEOUT,
    Outcome.COMPILE,
    Outcome.CRASH,
    Outcome.WRONG,
)


@dataclass(frozen=True)
class Reason:
    """A reason why configs were not used, their count, and some examples."""

    outcome: Outcome
    text: str
    count: int
    examples: tuple[str, ...]


def reasons(results: Iterable[Result]) -> list[Reason]:
    """The reasons, sorted by outcome as in FAILURES_IN_ORDER, then by frequency."""
    groups: dict[tuple[Outcome, str], list[Result]] = {}
    for result in results:
        if result.outcome.failed:
            groups.setdefault((result.outcome, NUMBER.sub("#", _reason_text(result))), []).append(result)
    merged = [
        Reason(
            outcome=outcome,
            text=_merged_text([_reason_text(r) for r in group]),
            count=len(group),
            examples=tuple(sorted({brief(r.config) for r in group})[:MAX_EXAMPLES]),
        )
        for (outcome, _), group in groups.items()
    ]
    return sorted(merged, key=lambda r: (FAILURES_IN_ORDER.index(r.outcome), -r.count, r.text))


def _reason_text(result: Result) -> str:
    if result.detail:
        return result.detail
    if result.outcome is Outcome.SLOW:
        return "far slower than the best so far"
    return "no reason was recorded"


def _merged_text(texts: Sequence[str]) -> str:
    """Merge texts that differ only in numbers, with the range of each number: `spills 520 to 900 bytes, over 512`."""
    numbers = [NUMBER.findall(text) for text in texts]
    ranges = []
    for values in zip(*numbers, strict=True):
        low, high = min(values, key=float), max(values, key=float)
        ranges.append(low if low == high else f"{low} to {high}")
    fragments = NUMBER.split(texts[0])
    return fragments[0] + "".join(number + text for number, text in zip(ranges, fragments[1:], strict=True))
