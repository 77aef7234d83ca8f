"""The text of a result: tables that fit 80 columns, as a notebook or a Python prompt shows it."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import fill, wrap

from parallax_gen.tuning.summary import Table

WIDTH = 80
GAP = "  "


def text_of(title: str, tables: Iterable[Table], notes: Iterable[str]) -> str:
    """A title, tables and notes, with empty lines between them."""
    parts = [fill(title, WIDTH)]
    parts += ["\n".join([fill(table.title, WIDTH)] * bool(table.title) + _lines(table)) for table in tables]
    return "\n\n".join([*parts, *(fill(note, WIDTH) for note in notes)])


def _lines(table: Table) -> list[str]:
    """A table's lines, its last column folded to the width."""
    rows = [table.columns, *table.lines]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    widths[-1] = max(8, min(widths[-1], WIDTH - sum(width + len(GAP) for width in widths[:-1])))
    justify = [str.rjust if name in table.right else str.ljust for name in table.columns]
    lines = []
    for *before, last in rows:
        for number, part in enumerate(wrap(last, widths[-1]) or [""]):
            cells = [*(cell if number == 0 else "" for cell in before), part]
            aligned = (align(cell, width) for align, cell, width in zip(justify, cells, widths, strict=True))
            lines.append(GAP.join(aligned).rstrip())
    return lines
