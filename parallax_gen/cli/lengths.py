"""`bench --lengths`: the cached keys of each sequence in a batch, as they are typed, kept in files and told."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import click

from parallax_gen.problem.shapes import LARGEST, Shape, skewed_lengths, spread_lengths

NAMED = {"spread": spread_lengths, "skewed": skewed_lengths}

_RUN = r"(?:[1-9]\d*x)?[1-9]\d*"
_TEXT = re.compile(rf"{_RUN}(?:,{_RUN})*")
_LONGEST_TOLD = 40  # characters
MOST_SEQUENCES = 2**20  # of a batch in a file

Runs = tuple[tuple[int, int], ...]  # (sequences, keys of each), in the batch's order


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
            found = _expanded(self.runs)
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
    return Lengths(_runs(text))


def to_text(lengths: Sequence[int]) -> str:
    """As --lengths takes them: 4096,7x128. Of none ""."""
    runs = [(len(list(run)), keys) for keys, run in itertools.groupby(lengths)]
    return ",".join(str(keys) if count == 1 else f"{count}x{keys}" for count, keys in runs)


def from_text(text: str) -> tuple[int, ...]:
    """What `to_text` wrote. Raises ValueError, also of more sequences or keys than a batch can have."""
    runs = _runs(text) if text else ()
    right = all(count >= 1 and 1 <= keys <= LARGEST for count, keys in runs)
    if not right or sum(count for count, _ in runs) > MOST_SEQUENCES:
        raise ValueError(f"{text!r:.80}: not the keys, 1 or more, of at most {MOST_SEQUENCES} sequences")
    return _expanded(runs)


def with_lengths(shape: Shape, lengths: Sequence[int]) -> str:
    """A shape for people, with its lengths where they differ from it: all of them where that is short."""
    if not lengths:
        return str(shape)
    text = to_text(lengths)
    if len(text) > _LONGEST_TOLD:
        text = f"{min(lengths)} to {max(lengths)}, {sum(lengths) / len(lengths):.0f} on the average"
    return f"{shape}, lengths {text}"


def _runs(text: str) -> Runs:
    parts = [run.rpartition("x") for run in text.split(",")]
    return tuple((int(count or 1), int(keys)) for count, _, keys in parts)


def _expanded(runs: Runs) -> tuple[int, ...]:
    return tuple(keys for count, keys in runs for _ in range(count))
