"""The text of a result: tables that fit 80 columns, as a notebook or a Python prompt shows it."""

from __future__ import annotations

from collections.abc import Iterable

from parallax_gen.tables import Table, paragraph, table_lines

WIDTH = 80


def text_of(title: str, tables: Iterable[Table], notes: Iterable[str]) -> str:
    """A title, tables and notes, with empty lines between them."""
    parts = [paragraph(title, WIDTH)]
    for table in tables:
        titles = [paragraph(table.title, WIDTH)] if table.title else []
        parts.append("\n".join([*titles, *table_lines(table, WIDTH)]))
    return "\n\n".join([*parts, *(paragraph(note, WIDTH) for note in notes)])
