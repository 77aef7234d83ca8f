"""Tables and paragraphs as lines of text that fit a width. No word is ever broken."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

GAP = "  "  # between columns
INDENT = "    "  # of a last column that stands below the others


@dataclass(frozen=True)
class Table:
    """right: the columns that are aligned right"""

    title: str
    columns: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]
    right: tuple[str, ...] = ()


Row = Sequence[str]


def table_lines(table: Table, width: int | None = None) -> list[str]:
    """A table's lines, its column titles first.

    If it is wider than `width`, cells are folded between words, in the columns where that adds the fewest lines; or the
    last column stands below the others, if that adds fewer. Columns in `right` are folded only if that is not enough. A
    table whose words need more than `width` is wider.
    """
    rows: list[Row] = [table.columns, *table.lines]
    natural = [max(1, *map(len, cells)) for cells in zip(*rows, strict=True)]
    text = [i for i, name in enumerate(table.columns) if name not in table.right]
    if width is None or _total(natural) <= width:
        return _lines(rows, natural, table)
    folded = _fold(rows, natural, text, width)
    last = len(natural) - 1
    if last in text and last > 0:
        shorter = [row[:last] for row in rows]
        others = _fold(shorter, natural[:last], text[:-1], width)
        below = [textwrap.indent(_wrapped(row[last], max(1, width - len(INDENT))), INDENT) for row in rows]
        added = sum(cell.count("\n") + 1 for cell in below if cell)
        if _total(others) <= width and (
            _total(folded) > width or _height(shorter, others) + added < _height(rows, folded)
        ):
            return _lines(shorter, others, table, below)
    if _total(folded) > width:
        folded = _fold(rows, natural, range(len(natural)), width)
    return _lines(rows, folded, table)


def paragraph(text: str, width: int | None = None, indent: str = "") -> str:
    """Text in lines of at most `width`, all but the first indented; without a width the text itself."""
    if width is None or max(map(len, text.splitlines()), default=0) <= width:
        return text
    return _wrapped(text, width, indent)


def _fold(rows: Sequence[Row], natural: list[int], folding: Sequence[int], width: int) -> list[int]:
    """Column widths that fit `width`, or the least ones that break no word. folding: the columns that may be folded."""
    widths = list(natural)
    least = {i: max(len(word) for row in rows for word in row[i].split() or [""]) for i in folding}
    while _total(widths) > width:
        narrower = []
        for i in folding:
            if widths[i] > max(1, least[i]):
                candidate = [w - (j == i) for j, w in enumerate(widths)]
                narrower.append((_height(rows, candidate), -widths[i], candidate))
        if not narrower:
            break
        widths = min(narrower)[2]
    return widths


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _height(rows: Sequence[Row], widths: Sequence[int]) -> int:
    """How many lines the rows take."""
    return sum(max(_count(cell, w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def _count(cell: str, width: int) -> int:
    return 1 if len(cell) <= width else _wrapped(cell, width).count("\n") + 1


def _lines(rows: Sequence[Row], widths: Sequence[int], table: Table, below: Sequence[str] = ()) -> list[str]:
    """The lines of rows, each followed by its text of `below`."""
    justify = [str.rjust if name in table.right else str.ljust for name in table.columns]
    lines = []
    for number, row in enumerate(rows):
        parts = [[c] if len(c) <= w else _wrapped(c, w).splitlines() for c, w in zip(row, widths, strict=True)]
        for i in range(max(map(len, parts))):
            cells = [part[i] if i < len(part) else "" for part in parts]
            lines.append(GAP.join(align(c, w) for align, c, w in zip(justify, cells, widths, strict=False)).rstrip())
        lines += below[number].splitlines() if below else []
    return lines


def _wrapped(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
