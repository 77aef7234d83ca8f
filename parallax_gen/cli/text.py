"""Output helpers: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

import click

from parallax_gen.tables import Table, paragraph, table_lines

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A rich console that prints text literally, with colours only on terminals."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def width_of(*, err: bool = False) -> int | None:
    """The terminal's width; None in a pipe or a file, unless the variable COLUMNS gives the width."""
    is_terminal = (sys.stderr if err else sys.stdout).isatty() or "COLUMNS" in os.environ
    return get_terminal_size().columns if is_terminal else None


def print_text(text: str, *, indent: str = "", err: bool = False) -> None:
    """Print text, folded between words if it is wider than the terminal. indent: of all lines but the first."""
    click.echo(paragraph(text, width_of(err=err), indent), err=err)


def print_table(
    columns: Sequence[str], lines: Iterable[Sequence[str]], *, right: Sequence[str] = (), err: bool = False
) -> None:
    """Print a table without rules that fits the terminal. Columns in `right` are aligned right."""
    print_tables([Table("", tuple(columns), [tuple(line) for line in lines], tuple(right))], err=err, gap=False)


def print_tables(tables: Iterable[Table], *, err: bool = False, gap: bool = True) -> None:
    """Print tables with their titles. gap: an empty line after each."""
    for table in tables:
        for line in table.title.splitlines():
            print_text(line, err=err)
        for number, line in enumerate(table_lines(table, width_of(err=err))):
            click.secho(line, bold=number == 0, err=err)
        if gap:
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
