"""The CSV file of `bench --csv`: rows in it are not timed again, and each case's new rows are appended at once."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from parallax_gen.bench.rows import Conditions, Effort, Row, from_flat, to_flat
from parallax_gen.errors import ArgumentError, ParallaxGenError
from parallax_gen.files import replace_file
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

_EMPTY = Row("", "decode", "", KernelSpec("decode", 64, "bf16"), Shape(1, 1, 1, 1, 1))
COLUMNS = list(to_flat(replace(_EMPTY, conditions=Conditions("", "", "", "", "", "", Effort()))))
# The columns of older files, which lack the last one or both of these.
ADDED_COLUMNS = ("lengths", "peaked_error")
OLDER_COLUMNS = [[c for c in COLUMNS if c not in ADDED_COLUMNS[first:]] for first in range(len(ADDED_COLUMNS))]


class ResultsCsv:
    """Rows by baseline, case, package and conditions, kept in a CSV file. Without a path rows are not saved.

    Rows are only appended, one shape at a time. An incomplete last line, left by a crash, is dropped. An older file is
    rewritten with the columns that it lacks, empty in its rows.
    """

    def __init__(self, path: Path | None = None):
        """Raises ParallaxGenError if `bench` did not write the file, or if it cannot be read and written."""
        self._path = path
        self._rows: dict[object, Row] = {}
        if path is not None:
            try:
                for row in _read_or_create(path):
                    self._rows[_identity(row)] = row
            except (OSError, UnicodeDecodeError, csv.Error) as error:
                raise ParallaxGenError(f"--csv: {path} cannot be used: {error}") from error

    def stored(self, row: Row) -> Row | None:
        """The stored row with the same baseline, part, spec, shape, package and conditions."""
        return self._rows.get(_identity(row))

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows. Raises ParallaxGenError if the file cannot be written."""
        if self._path is not None:
            try:
                _append(self._path, _as_text(to_flat(row).values() for row in rows))
            except OSError as error:
                raise ParallaxGenError(f"--csv: {self._path} cannot be written: {error}") from error
        self._rows.update((_identity(row), row) for row in rows)


def _identity(row: Row) -> object:
    return row.baseline, row.compared_at, row.package, row.conditions


def _read_or_create(path: Path) -> list[Row]:
    """The rows of a file. Creates the file if necessary, and drops an incomplete last line."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text:
        text = _as_text([COLUMNS])
        _append(path, text)
    columns = next(csv.reader([text.partition("\n")[0]]), [])
    if columns not in (COLUMNS, *OLDER_COLUMNS):
        raise ParallaxGenError(f"--csv: {path} does not have the columns of parallax-gen bench: choose another file")
    whole, _, tail = text.rpartition("\n")
    if whole and tail and not _rows([tail], columns):
        os.truncate(path, len(whole.encode()) + 1)  # otherwise appended rows could become part of an unclosed quotation
        text, tail = f"{whole}\n", ""
    _append(path, "\n" if tail else "")  # also checks that the file can be written
    if columns != COLUMNS:
        replace_file(path.resolve(), _with_all_columns(text))  # resolve(), so that a link stays a link
    return _rows(io.StringIO(text.partition("\n")[2], newline=""), columns)


def _with_all_columns(text: str) -> str:
    """An older file's text with an empty cell in every row for each column that it lacks."""
    lines = csv.DictReader(io.StringIO(text, newline=""))
    return _as_text([COLUMNS, *([line.get(name, "") for name in COLUMNS] for line in lines)])


def _rows(lines: Iterable[str], columns: list[str]) -> list[Row]:
    """The rows that can be parsed. Others are ignored, because someone may have edited the file."""
    rows = []
    for texts in csv.DictReader(lines, columns):
        if None not in texts.values():  # None stands for a missing cell
            with suppress(ArgumentError):
                rows.append(from_flat(texts))
    return rows


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def _as_text(lines: Iterable[Iterable[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
