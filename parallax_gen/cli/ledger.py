"""The file of `bench --csv`: what it holds is not timed again, and what is timed is added to it at once."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from parallax_gen.cli.rows import Conditions, Effort, Row, from_flat, to_flat
from parallax_gen.errors import ParallaxGenError
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

_ANY = Row("", "decode", "", KernelSpec("decode", 64, "bf16"), Shape(1, 1, 1, 1, 1))
COLUMNS = list(to_flat(replace(_ANY, conditions=Conditions("", "", "", "", "", "", Effort()))))
WITHOUT_LENGTHS = [name for name in COLUMNS if name != "lengths"]  # of files from before there were any


class Ledger:
    """Rows by what they are of. Without a path it begins empty and keeps nothing.

    Rows are only ever added, a shape's at a time. Of a line that is not whole, from a machine that went down, nothing
    is kept. A file from before sequences had lengths is written anew, with their column.
    """

    def __init__(self, path: Path | None = None):
        """Raises ParallaxGenError if the file is another's, or cannot be read and written."""
        self._path = path
        self._rows: dict[object, Row] = {}
        if path is not None:
            try:
                for row in _opened(path):
                    self._rows[_identity(row)] = row
            except (OSError, UnicodeDecodeError, csv.Error) as error:
                raise ParallaxGenError(f"--csv: {path} cannot be used: {error}") from error

    def known(self, row: Row) -> Row | None:
        """What the file has of the same contender, part, spec, shape, package and conditions."""
        return self._rows.get(_identity(row))

    def add(self, rows: Sequence[Row]) -> None:
        """Raises ParallaxGenError where the file cannot be written any more."""
        if self._path is not None:
            try:
                _append(self._path, _as_text(to_flat(row).values() for row in rows))
            except OSError as error:
                raise ParallaxGenError(f"--csv: {self._path} cannot be written: {error}") from error
        self._rows.update((_identity(row), row) for row in rows)


def _identity(row: Row) -> object:
    return row.contender, row.what, row.package, row.conditions


def _opened(path: Path) -> list[Row]:
    """The rows of a file, which is made where there is none, and mended: its last line is whole."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text:
        text = _as_text([COLUMNS])
        _append(path, text)
    columns = next(csv.reader([text.partition("\n")[0]]), [])
    if columns not in (COLUMNS, WITHOUT_LENGTHS):
        raise ParallaxGenError(f"--csv: {path} has other columns than bench writes: name another file")
    whole, _, tail = text.rpartition("\n")
    if whole and tail and not _rows([tail], columns):
        os.truncate(path, len(whole.encode()) + 1)  # what follows an open quotation mark would be lost
        text, tail = f"{whole}\n", ""
    _append(path, "\n" if tail else "")  # and thereby: can it be written?
    if columns == WITHOUT_LENGTHS:
        _replace(path, _widened(text))
    return _rows(io.StringIO(text.partition("\n")[2], newline=""), columns)


def _widened(text: str) -> str:
    """A file's text with an empty cell for lengths in every row."""
    at = COLUMNS.index("lengths")
    _, *lines = csv.reader(io.StringIO(text, newline=""))
    return _as_text([COLUMNS, *([*line[:at], "", *line[at:]] for line in lines)])


def _replace(path: Path, text: str) -> None:
    """Whoever reads the file finds the old text or the new one, whole."""
    path = path.resolve()
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _rows(lines: Iterable[str], columns: list[str]) -> list[Row]:
    """Those that can be read: someone may have had a hand in the file."""
    found = []
    for line in csv.DictReader(lines, columns):
        with suppress(KeyError, ValueError, TypeError):  # None for a field that is missing
            found.append(from_flat({"lengths": ""} | line))
    return found


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def _as_text(lines: Iterable[Iterable[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
