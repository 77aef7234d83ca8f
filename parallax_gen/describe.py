"""Configs, numbers and sequence lengths as text for people."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from parallax_gen.ops.base import KernelConfig, config_to_dict
from parallax_gen.problem.shapes import LARGEST_SIZE, Bucket, Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import rate, rate_unit

# -- Configs

_LETTERS = {
    "BLOCK_M": "M",
    "BLOCK_N": "N",
    "BLOCK_H": "H",
    "GROUP_HEADS": "G",
    "NUM_SPLITS": "S",
    "merge": "",
    "num_warps": "w",
    "num_stages": "s",
    "HEAD_DIM_LAYOUT": "",
    "maxnreg": "r",
    "LOADS": "",
    "MASK": "",
    "QR_TILE": "",
    "SOFTMAX": "",
    "ROW_STATS": "",
}

# Short forms of long values, for tables.
_SHORT_VALUES: dict[object, str] = {
    "chunked": "chunk",
    "fixed_reference": "fixed",
    "before_exp": "pre",
    "stacked": "qr",
    "descriptors": "tma",
}

LEGEND = (
    "config: M, N, H = BLOCK_M, BLOCK_N, BLOCK_H; G = GROUP_HEADS; S = NUM_SPLITS; w, s = num_warps, num_stages;\n"
    "r = maxnreg; words are values of other knobs: chunk = chunked, fixed = fixed_reference, pre = before_exp,\n"
    "qr = QR_TILE stacked, tma = LOADS descriptors; "
    "BxH: batch x kv_heads; seqlen: queries x keys, or only keys if both are equal or there is one query; W: window"
)


def describe(config: KernelConfig) -> str:
    """A config in full: `BLOCK_M=128 BLOCK_N=64 ...`. Only for people: nothing parses it."""
    return " ".join(f"{name}={value}" for name, value in config_to_dict(config).items())


def brief(config: KernelConfig) -> str:
    """A config short enough for a table: `M128 N64 G8 w8 s3 chunk`, `N32 H8 S16 last w1 s4`."""
    # merge is "none" for a single split, which S1 already says.
    choices = {name: value for name, value in config_to_dict(config).items() if value != "none"}
    return " ".join(f"{_LETTERS[name]}{_SHORT_VALUES.get(value, value)}" for name, value in choices.items())


# -- Numbers


def number(value: float) -> str:
    """A number with four significant digits, or more if it has more digits before the point: 12345, 512.3, 8.123."""
    return f"{value:.{max(0, min(3, 3 - math.floor(math.log10(value))))}f}" if value > 0 else "0"


def gain_text(gain: float | None) -> str:
    """The speedup over the default, `1.12x`; "-" if it is unknown."""
    return "-" if gain is None else f"{gain:.2f}x"


def duration(seconds: float) -> str:
    """A duration rounded up: `40 s`, `10 min`, `2 h 5 min`."""
    if seconds <= 90:
        return f"{math.ceil(seconds)} s"
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def time_and_rate(spec: KernelSpec, shape: Shape, time_us: float) -> str:
    """`123.4 us, 512.3 TFLOP/s`."""
    return f"{number(time_us)} us, {number(rate(spec, shape, time_us))} {rate_unit(spec.op)}"


_Text = TypeVar("_Text", bound=str)


def format_counts(counts: Mapping[_Text, int]) -> str:
    """`13 resources, 2 wrong`, the largest count first."""
    largest_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in largest_first)


# -- Sequence lengths: one for the whole batch, or one per sequence

RunLengths = tuple[tuple[int, int], ...]  # run-length encoding in batch order: (sequences, keys of each)

MAX_SEQUENCES = 2**20  # in a batch that is read from a file
_MAX_LISTED = 40  # characters of a list of lengths
_NUMBER = r"[1-9][0-9]{0,18}"
_RUN = rf"(?:{_NUMBER}x)?{_NUMBER}"
_RUNS = re.compile(rf"{_RUN}(?:,{_RUN})*")


def seqlen_text(bucket: Bucket | Shape) -> str:
    """The sequence lengths and window of a bucket or shape. One length if both are equal or there is a single query."""
    one_length = bucket.seqlen_q in (1, bucket.seqlen_kv)
    text = str(bucket.seqlen_kv) if one_length else f"{bucket.seqlen_q}x{bucket.seqlen_kv}"
    return f"{text} W{bucket.window}" if bucket.window else text


def with_lengths(shape: Shape, lengths: Sequence[int]) -> str:
    """A shape, and each sequence's length if they differ: the list if that is short, else the range and the mean."""
    if not lengths:
        return str(shape)
    text = lengths_to_text(lengths)
    if len(text) > _MAX_LISTED:
        text = f"{min(lengths)} to {max(lengths)}, {sum(lengths) / len(lengths):.0f} on average"
    return f"{shape}, lengths {text}"


def lengths_to_text(lengths: Sequence[int]) -> str:
    """Sequence lengths in the format of `bench --lengths`: 4096,7x128; "" for no lengths."""
    run_lengths = [(len(list(run)), keys) for keys, run in itertools.groupby(lengths)]
    return ",".join(str(keys) if count == 1 else f"{count}x{keys}" for count, keys in run_lengths)


def lengths_from_text(text: str) -> tuple[int, ...]:
    """The inverse of `lengths_to_text`. Raises ValueError on bad syntax, or too many sequences or keys for a batch."""
    run_lengths = parse_run_lengths(text) if text else ()
    if sum(count for count, _ in run_lengths) > MAX_SEQUENCES or any(keys > LARGEST_SIZE for _, keys in run_lengths):
        raise ValueError(f"{text!r:.80}: more than {MAX_SEQUENCES} sequences, or {LARGEST_SIZE} keys")
    return expand_run_lengths(run_lengths)


def parse_run_lengths(text: str) -> RunLengths:
    """Parse a text such as 4096,7x128 into run lengths. Raises ValueError."""
    if not _RUNS.fullmatch(text):
        raise ValueError(
            f"{text!r:.80} is not a list of keys per sequence, 1 or more each, such as 4096,128,128 or 4096,7x128"
        )
    parts = [run.rpartition("x") for run in text.split(",")]
    return tuple((int(count or 1), int(keys)) for count, _, keys in parts)


def expand_run_lengths(run_lengths: RunLengths) -> tuple[int, ...]:
    """Each sequence's length."""
    return tuple(keys for count, keys in run_lengths for _ in range(count))
