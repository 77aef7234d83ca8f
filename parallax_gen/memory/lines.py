"""Reads and writes results as JSON lines: the format of shipped, exported and imported records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from parallax_gen.errors import StoreError
from parallax_gen.files import replace_file
from parallax_gen.memory.result import LONGEST_REASON, MALFORMED, Result
from parallax_gen.memory.store import Store


@dataclass(frozen=True)
class ParsedRecords:
    """Parsed records, plus one message (line, reason) for each line that failed to parse."""

    results: list[Result]
    problems: list[str]


def to_line(result: Result) -> str:
    """A result as one line, newline included. An infinite error is written as Infinity, as Python's json does."""
    return json.dumps(result.to_dict()) + "\n"


def from_line(line: bytes) -> Result:
    """The inverse of `to_line`. Raises one of MALFORMED on anything else."""
    return Result.from_dict(json.loads(line))


def read_lines(name: str, lines: Iterable[bytes]) -> ParsedRecords:
    """Parse lines into results, each checked like user input; empty lines are skipped. name: where they come from."""
    parsed = ParsedRecords([], [])
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            parsed.results.append(from_line(line))
        except MALFORMED as error:
            parsed.problems.append(f"{name}, line {number}: not a record: {str(error)[:LONGEST_REASON]}")
    return parsed


def read_file(path: Path) -> ParsedRecords:
    """Read the results of a file of JSON lines, or of another tuning database, read-only. Raises StoreError."""
    if is_database(path):
        with Store(path, read_only=True) as store:
            return ParsedRecords(store.all(), [f"{path}, {problem}" for problem in store.unreadable_rows()])
    try:
        with path.open("rb") as file:
            return read_lines(str(path), file)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}") from error


def is_database(path: Path) -> bool:
    """Whether a file begins as every SQLite database does."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"
    return False


def write_lines(path: Path, results: Iterable[Result]) -> None:
    """Replace a file of JSON lines atomically. Raises StoreError."""
    try:
        replace_file(path, "".join(map(to_line, results)), durable=True)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}") from error
