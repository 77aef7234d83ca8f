"""`bench --lengths`: the cached keys of each sequence in a batch, as they are typed."""

from __future__ import annotations

import re
from dataclasses import dataclass

import click

from parallax_gen.describe import Runs, expanded, runs_of
from parallax_gen.problem.shapes import Shape, skewed_lengths, spread_lengths

NAMED = {"spread": spread_lengths, "skewed": skewed_lengths}

_RUN = r"(?:[1-9]\d*x)?[1-9]\d*"
_TEXT = re.compile(rf"{_RUN}(?:,{_RUN})*")


@dataclass(frozen=True)
class Lengths:
    """A --lengths as it was typed: the runs of one batch, or the name of a batch that every shape has."""

    runs: Runs = ()
    named: str = ""

    def of(self, shape: Shape) -> tuple[int, ...]:
        """The keys of each sequence; () where all have as many as the shape says. Raises UsageError."""
        if self.named:
            found = NAMED[self.named](shape)
        else:
            count, longest = sum(count for count, _ in self.runs), max(keys for _, keys in self.runs)
            if count != shape.batch or longest > shape.seqlen_kv:
                raise click.UsageError(
                    f"--lengths: {count} sequences of up to {longest} keys, not those of --shape {shape}"
                )
            found = expanded(self.runs)
        return () if set(found) == {shape.seqlen_kv} else found


def lengths_of(text: str) -> Lengths:
    """What spread, skewed or a text such as 4096,7x128 means. Raises BadParameter."""
    text = re.sub(r"\s", "", text)
    if text in NAMED:
        return Lengths(named=text)
    if not _TEXT.fullmatch(text):
        raise click.BadParameter(
            f"{text!r} is neither {' nor '.join(NAMED)} nor the keys of each sequence, 1 or more, "
            "such as 4096,128,128 or 4096,7x128"
        )
    return Lengths(runs_of(text))
