"""Results as lines of JSON: what ships, what is exported, and what is imported again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from parallax_gen.errors import StoreError
from parallax_gen.files import replace_file
from parallax_gen.memory.result import LONGEST_REASON, NO_RESULT, Result
from parallax_gen.memory.store import Store


@dataclass(frozen=True)
class Found:
    """What a source holds: its results, and of what is no result where it stands and what is wrong with it."""

    results: list[Result]
    bad: list[str]


def to_line(result: Result) -> str:
    """A result as one line, with its end. As Python writes JSON: an error that is infinite is Infinity."""
    return json.dumps(result.to_dict()) + "\n"


def from_line(line: bytes) -> Result:
    """The result that `to_line` wrote. Raises one of NO_RESULT on anything else."""
    return Result.from_dict(json.loads(line))


def read_lines(name: str, lines: Iterable[bytes]) -> Found:
    """The results in lines, each checked like a user's input; empty lines are none. `name`: of their source."""
    found = Found([], [])
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.results.append(from_line(line))
        except NO_RESULT as error:
            found.bad.append(f"{name}, line {number}: not a record: {str(error)[:LONGEST_REASON]}")
    return found


def read_file(path: Path) -> Found:
    """The results in a file of lines, or in another tuning database, which is only read. Raises StoreError."""
    if is_database(path):
        with Store(path, read_only=True) as store:
            return Found(store.all(), [f"{path}, {problem}" for problem in store.unreadable_rows()])
    try:
        with path.open("rb") as file:
            return read_lines(str(path), file)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}") from error


def is_database(path: Path) -> bool:
    """Whether a file is one of SQLite's, by how all of them begin."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"
    return False


def write_lines(path: Path, results: Iterable[Result]) -> None:
    """Write a file so that anyone who reads it finds the old one or the new one, whole. Raises StoreError."""
    try:
        replace_file(path, "".join(map(to_line, results)), durable=True)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}") from error
