"""Output helpers: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from parallax_gen.tuning.summary import Table


def console(*, stderr: bool = False) -> Console:
    """A rich console that prints text literally, with colours only on terminals."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


GAP = "  "  # between columns
MIN_WIDTH = 8  # of a folded column


def print_table(
    columns: Sequence[str], lines: Iterable[Sequence[str]], *, right: Sequence[str] = (), err: bool = False
) -> None:
    """Print a table without rules, folding its last column if it is too wide. Columns in `right` are aligned right.

    In a pipe or a file nothing is folded, unless the variable COLUMNS gives the width. err: print on standard error.
    """
    table = [columns, *lines]
    widths = [max(1, *map(len, cells)) for cells in zip(*table, strict=True)]
    if (sys.stderr if err else sys.stdout).isatty() or "COLUMNS" in os.environ:
        used = sum(width + len(GAP) for width in widths[:-1])
        widths[-1] = min(widths[-1], max(get_terminal_size().columns - used, MIN_WIDTH))
    justify = [str.rjust if name in right else str.ljust for name in columns]
    for line, (*before, last) in enumerate(table):
        for fold, part in enumerate(wrap(last, widths[-1]) or [""]):
            cells = (*(cell if fold == 0 else "" for cell in before), part)
            aligned = (align(cell, width) for align, cell, width in zip(justify, cells, widths, strict=True))
            click.secho(GAP.join(aligned).rstrip(), bold=line == 0, err=err)


def print_tables(tables: Iterable[Table], *, err: bool = False) -> None:
    """Print tables with their titles, and an empty line after each."""
    for table in tables:
        if table.title:
            click.echo(table.title, err=err)
        print_table(table.columns, table.lines, right=table.right, err=err)
        click.echo(err=err)


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on standard output. Values that JSON does not have, such as infinity, become null."""
    click.echo(json.dumps(_without_infinities(document), indent=2, allow_nan=False))


def _without_infinities(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _without_infinities(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(part) for part in value]
    return value
