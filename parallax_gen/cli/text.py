"""How results are put for people, in 80 columns, and for programs, as JSON."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any, TypeVar

import click

from parallax_gen.ops.base import KernelConfig, config_to_dict
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import work_of_lengths
from parallax_gen.tuning.search.cost_model import bound_by_matmuls

if TYPE_CHECKING:
    from rich.console import Console

_Text = TypeVar("_Text", bound=str)

_LETTERS = {
    "BLOCK_M": "M",
    "BLOCK_N": "N",
    "BLOCK_H": "H",
    "HEAD_GROUP": "G",
    "NUM_SPLITS": "S",
    "merge": "",
    "num_warps": "w",
    "num_stages": "s",
    "HEAD_DIM_AS": "",
    "maxnreg": "r",
    "MASK": "",
    "ROW_MAX": "",
    "ROW_NUMBERS": "",
}

LEGEND = (
    "config: M N H are BLOCK_M BLOCK_N BLOCK_H, G HEAD_GROUP, S NUM_SPLITS, w warps, s stages,\n"
    "r maxnreg; seqlen: W is a window's"
)


def brief(config: KernelConfig) -> str:
    """A config short enough for a table: `M128 N64 G8 w8 s3 pieces`, `N32 H8 S16 last w1 s4`."""
    choices = config_to_dict(config)
    if isinstance(config, DecodeConfig) and config.merge == "none":
        del choices["merge"]  # one split: nothing to merge
    return " ".join(f"{_LETTERS[name]}{value}" for name, value in choices.items())


def lengths(bucket: Bucket | Shape) -> str:
    """A bucket's or a shape's sequence lengths, one where they are the same or the query is single, and its window."""
    alone = bucket.seqlen_q in (1, bucket.seqlen_kv)
    text = str(bucket.seqlen_kv) if alone else f"{bucket.seqlen_q}x{bucket.seqlen_kv}"
    return f"{text} W{bucket.window}" if bucket.window else text


def rate_unit(op: str) -> str:
    """What the rate of an op is counted in: what bounds its time, matmuls or memory."""
    return "TFLOP/s" if bound_by_matmuls(op) else "GB/s"


def rate(spec: KernelSpec, shape: Shape, time_us: float, lengths: Sequence[int] = ()) -> float:
    """How much of the work that must be done is done a second, in `rate_unit`; `lengths` as of `work_of_lengths`."""
    work = work_of_lengths(spec, shape, lengths)
    return work.flops / time_us / 1e6 if bound_by_matmuls(spec.op) else work.bytes / time_us / 1e3


def number(value: float) -> str:
    """Four digits, and those before the point: 1234, 512.3, 8.123."""
    return f"{value:.{max(0, min(3, 3 - math.floor(math.log10(value))))}f}" if value > 0 else "0"


def gain_text(gain: float | None) -> str:
    """What is gained over the default, `1.12x`; "-" where that is not known."""
    return "-" if gain is None else f"{gain:.2f}x"


def time_and_rate(spec: KernelSpec, shape: Shape, time_us: float) -> str:
    return f"{number(time_us)} us, {number(rate(spec, shape, time_us))} {rate_unit(spec.op)}"


def counted(kinds: Mapping[_Text, int]) -> str:
    """`13 resources, 2 wrong`, the most first."""
    most_first = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in most_first)


def console(*, stderr: bool = False) -> Console:
    """Of rich: text is taken as it is, and colours are for terminals alone."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


GAP = "  "  # between columns
LEAST_WIDTH = 8  # of a column that is folded


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print a table without lines; where it is too wide its last column is folded. Those in `right` hold numbers.

    In a pipe or a file nothing is folded, unless COLUMNS says how wide it should be.
    """
    table = [columns, *rows]
    widths = [max(1, *map(len, cells)) for cells in zip(*table, strict=True)]
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        others = sum(width + len(GAP) for width in widths[:-1])
        widths[-1] = min(widths[-1], max(get_terminal_size().columns - others, LEAST_WIDTH))
    justify = [str.rjust if name in right else str.ljust for name in columns]
    for row, (*before, last) in enumerate(table):
        for line, part in enumerate(wrap(last, widths[-1]) or [""]):
            cells = (*(cell if line == 0 else "" for cell in before), part)
            placed = (place(cell, width) for place, cell, width in zip(justify, cells, widths, strict=True))
            click.secho(GAP.join(placed).rstrip(), bold=row == 0)


def print_json(document: Mapping[str, Any]) -> None:
    """The one thing on standard output. What no JSON number can be, an infinite error, is null."""
    click.echo(json.dumps(_plain(document), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
