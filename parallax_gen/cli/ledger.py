"""The file of `bench --csv`: what it holds is not timed again, and what is timed is added to it at once."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from parallax_gen.cli.rows import Conditions, Effort, Row, from_flat, to_flat
from parallax_gen.errors import ParallaxGenError
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

_ANY = Row("", "decode", "", KernelSpec("decode", 64, "bf16"), Shape(1, 1, 1, 1, 1))
COLUMNS = list(to_flat(replace(_ANY, conditions=Conditions("", "", "", "", "", "", Effort()))))


class Ledger:
    """Rows by what they are of. Without a path it begins empty and keeps nothing.

    Rows are only ever added, a shape's at a time. A line that is not whole, from a machine that went down, is passed
    over.
    """

    def __init__(self, path: Path | None = None):
        """Raises ParallaxGenError if the file is another's, or cannot be read and written."""
        self._path = path
        self._rows: dict[object, Row] = {}
        self.unreadable = 0
        if path is not None:
            try:
                self._open(path)
            except (OSError, UnicodeDecodeError, csv.Error) as error:
                raise ParallaxGenError(f"--csv: {path} cannot be used: {error}") from error

    def _open(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if not text:
            self._append([COLUMNS])
            return
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if reader.fieldnames != COLUMNS:
            raise ParallaxGenError(f"--csv: {path} has other columns than bench writes: name another file")
        for line in reader:
            try:
                self._remember(from_flat(line))
            except (KeyError, ValueError, TypeError):  # None for a field that is missing
                self.unreadable += 1
        self._append([], after="" if text.endswith("\n") else "\n")  # also: can it be written?

    def known(self, row: Row) -> Row | None:
        """What the file has of the same contender, part, spec, shape, package and conditions."""
        return self._rows.get(_identity(row))

    def add(self, rows: Iterable[Row]) -> None:
        """Raises ParallaxGenError where the file cannot be written any more."""
        rows = list(rows)
        if self._path is not None:
            try:
                self._append([[*to_flat(row).values()] for row in rows])
            except OSError as error:
                raise ParallaxGenError(f"--csv: {self._path} cannot be written: {error}") from error
        for row in rows:
            self._remember(row)

    def _remember(self, row: Row) -> None:
        self._rows[_identity(row)] = row

    def _append(self, lines: list[list[object]] | list[list[str]], after: str = "") -> None:
        text = io.StringIO(after, newline="")
        text.seek(0, os.SEEK_END)
        csv.writer(text, lineterminator="\n").writerows(lines)
        assert self._path is not None
        with self._path.open("a", encoding="utf-8", newline="") as file:  # in one piece
            file.write(text.getvalue())


def _identity(row: Row) -> object:
    return row.contender, row.op, row.part, row.spec, row.shape, row.package, row.conditions
