"""The tuning database: one row per place, config and kernel, failures included. The only user of SQLite.

Python's own sqlite3 reads and migrates it. Writing takes sqlite-utils, of the extra `tune`.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import platformdirs

from parallax_gen.errors import MachineError, StoreError, tune_extra
from parallax_gen.files import data_dir, user_path
from parallax_gen.memory.bounds import MAX_INT
from parallax_gen.memory.old import renamed_json
from parallax_gen.memory.place import Place, Scalar
from parallax_gen.memory.result import LONGEST_REASON, MALFORMED, Outcome, Result, reading_order, supersedes
from parallax_gen.memory.rows import IDENTITY, from_row, identity_of, to_row

Arguments = Mapping[str, Scalar] | tuple[Scalar, ...]  # of a query: named or in order

APPLICATION_ID = 0x50585447  # "PXTG" in a SQLite file's header: the file is ours
BUSY_SECONDS = 60.0  # to wait for other processes, each of which locks the database for milliseconds
SAME_IDENTITY = " and ".join(f"{name} = :{name}" for name in IDENTITY)


def default_path() -> Path:
    """The user's database: $PARALLAX_GEN_DB, else tuning.db in the user's data folder. Raises StoreError."""
    try:
        return user_path("PARALLAX_GEN_DB", lambda: f"{platformdirs.user_data_dir('parallax_gen')}/tuning.db")
    except MachineError as error:
        raise StoreError(f"no place for the tuning database: {error}") from error


class MergeCounts(NamedTuple):
    """How many results were new, replaced stored ones, or were discarded so that the stored ones were kept."""

    new: int
    replaced: int
    kept: int


class Store:
    """The tuning database at `path` (default: `default_path()`), created if it is missing.

    Any number of processes may have it open: each write is one short transaction in write-ahead mode, waits for
    its turn, and is durable once `save` returns. With read_only, a missing file is an empty database. Only the thread
    that opened it may use it; any may use a read-only one, because autograd's threads dispatch kernels too.
    Raises StoreError if the file cannot be used, belongs to another program or has a newer schema, and unless it is
    read-only, if sqlite-utils is not installed, before the file is created or changed.
    """

    def __init__(self, path: str | Path | None = None, *, read_only: bool = False) -> None:
        self.path = default_path() if path is None else Path(path)
        self.read_only = read_only
        self._unreadable: set[tuple[object, ...]] = set()
        self._turn = RLock()  # sqlite3 keeps statements: threads that execute the same one would share its rows
        with self._access(), ExitStack() as undo:
            if not read_only:
                with tune_extra(f"writing the tuning database {self.path}", StoreError):
                    from sqlite_utils import Database
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _connect(self.path, "mode=ro" if read_only else "mode=rwc")
            undo.callback(self.close)
            if read_only:
                self._prepare_to_read()
            else:
                self._writer = Database(self._db, recursive_triggers=False, execute_plugins=False)
                self._prepare_to_write()
            undo.pop_all()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    @property
    def unreadable(self) -> int:
        """How many rows were skipped so far because they could not be parsed."""
        return len(self._unreadable)

    def save(self, result: Result) -> None:
        """Store a result, unless the stored result of the same identity supersedes it (see `supersedes`).

        A stored trial number remains.
        """
        with self._writing():
            self._save(result, self._stored(result))

    def save_trial(self, result: Result) -> None:
        """Like `save`, for a trial that just ended: a config's first one gets the next number of its place."""
        with self._writing():
            old = self._stored(result)
            if result.trial is None and result.outcome.tried and (old is None or not old.outcome.tried):
                result = replace(result, trial=self._next_trial(result.place))
            self._save(result, old)

    def merge(self, results: Iterable[Result]) -> MergeCounts:
        """Store results from elsewhere in one transaction.

        A result replaces the stored one of the same identity if that does not supersede it (`supersedes`). Otherwise
        the stored one is kept, so merging the same results again changes nothing.
        """
        new = replaced = kept = 0
        with self._writing():
            for result in results:
                old = self._stored(result)
                if old is not None and supersedes(old, result):
                    kept += 1
                    continue
                self._upsert(result, old)
                new, replaced = (new + 1, replaced) if old is None else (new, replaced + 1)
        return MergeCounts(new, replaced, kept)

    def delete(self, results: Iterable[Result]) -> int:
        """Delete these results, except those that were replaced since they were read. Returns how many were deleted."""
        deleted = 0
        with self._writing():
            for result in results:
                if self._stored(result) == result:
                    self._db.execute(f"DELETE FROM measurements WHERE {SAME_IDENTITY}", identity_of(result))
                    deleted += 1
        return deleted

    def results(self, place: Place) -> list[Result]:
        """All results of a place, of any kernel and toolchain: the measured ones first, from fast to slow."""
        with self._access():
            results = self._results_of_old_schema(place) if self._has_old_schema() else self._of_place(place, self._db)
            return sorted(results, key=reading_order)

    def all(self, gpu: str | None = None, op: str | None = None) -> list[Result]:
        """Every row, or those of a GPU or an op, sorted by place and then from fast to slow."""
        conditions = {name: value for name, value in (("gpu", gpu), ("op", op)) if value is not None}
        where = " and ".join(f"{name} = :{name}" for name in conditions) or "true"
        with self._access():
            return sorted(self._select(where, conditions), key=reading_order)

    def fastest(self, gpu: str, op: str) -> list[Result]:
        """The fastest measured result of each place of a GPU and an op, in any order. Parses only these rows."""
        query = "SELECT *, min(time_us) FROM measurements WHERE gpu = ? AND op = ? AND outcome = ? GROUP BY place_json"
        with self._access():
            rows = _rows(self._tables, query, (gpu, op, Outcome.OK.value)) if self._version() else ()
            return list(self._parsed(rows))

    @property
    def schema(self) -> int:
        """The schema version: the number of the last migration, 0 for a database that does not exist yet."""
        with self._access():
            return self._version(self._tables)

    def problems(self) -> list[str]:
        """The problems of the file, one sentence each. Raises StoreError if it is too damaged to be read."""
        with self._access():
            lines = [row[0] for row in self._db.execute("PRAGMA integrity_check(20)")]
        return [f"integrity: {line}" for line in lines if line != "ok"] + self.unreadable_rows()

    def unreadable_rows(self) -> list[str]:
        """One message (row, reason) for each row that is skipped because it does not parse."""
        problems: list[str] = []
        with self._access():
            if not self._version():
                return problems
            for row in _rows(self._tables, "SELECT rowid AS number, * FROM results"):
                problems.append(f"row {row['number']} from before fingerprints: not a record, or a duplicate")
            for row in _rows(self._tables, "SELECT rowid AS number, * FROM measurements"):
                try:
                    from_row(row)
                except (*MALFORMED, KeyError) as error:
                    problems.append(f"row {row['number']}: {str(error)[:LONGEST_REASON]}")
        return problems

    def in_trial_order(self) -> list[Result]:
        """All rows in the order in which configs were first tried.

        The order is that of the numbers `Result.trial`. Rows without one come first, in the order in which they were
        stored: that of their trials, unless they were imported. A config that is timed again keeps its position.
        """
        with self._access():
            return sorted(self._select("true ORDER BY rowid"), key=lambda result: result.trial or 0)

    def _prepare_to_write(self) -> None:
        """Migrate the schema and switch to write-ahead mode."""
        self._migrate(self._db)
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._writer.enable_wal()
                break
            except sqlite3.OperationalError as error:
                # If another process is switching the same file, SQLite fails at once instead of waiting.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def _prepare_to_read(self) -> None:
        """Check that the file is ours; reopen it if it cannot be read in write-ahead mode."""
        try:
            self._version()
        except sqlite3.OperationalError:
            # A writer that was killed may have left changes to undo, beside the file: SQLite does that if it may write.
            # Without such files nobody is writing. Write-ahead mode creates files even to read: if that is not allowed,
            # the file can be opened as immutable.
            left = any(Path(f"{self.path.resolve()}{end}").exists() for end in ("-journal", "-wal"))
            self._db.close()
            self._db = _connect(self.path, "mode=rw" if left else "immutable=1")
            self._version()

    def _has_old_schema(self) -> bool:
        """Whether a read-only file's rows need a migration before they parse: only those of schema 1 do."""
        return self.read_only and self._version() == 1

    @property
    def _tables(self) -> sqlite3.Connection:
        """A database with today's schema: the file's, or a migrated copy of it in memory."""
        return self._migrated_copy if self._has_old_schema() else self._db

    @cached_property
    def _migrated_copy(self) -> sqlite3.Connection:
        copy = _connect(Path(":memory:"), "mode=ro")
        self._db.backup(copy)
        self._migrate(copy)
        return copy

    def _results_of_old_schema(self, place: Place) -> list[Result]:
        """`results` of a file with schema 1. Migrates only the place's rows: a call has no time for all of them.

        The key of an old row was the JSON of its place and then of its environment.
        """
        prefix = json.dumps(place.flat()).removesuffix("}") + ', "environment.'
        kernels, keys = (place.gpu, place.spec.public_op), (prefix, f"{prefix}~")
        if not list(self._db.execute("SELECT 1 FROM results WHERE gpu = ? AND op = ? LIMIT 1", kernels)):
            return []
        # This scans in file order, which is faster than the index if most rows are of one op.
        rows = list(self._db.execute("SELECT * FROM results WHERE key_json > ? AND key_json < ?", keys))
        if not rows:
            return []
        with closing(_connect(Path(":memory:"), "mode=ro")) as copy:
            self._migrate(copy, self._version())
            copy.executemany(f"INSERT INTO results VALUES ({', '.join('?' * len(rows[0]))})", rows)
            copy.commit()
            self._migrate(copy)
            return list(self._of_place(place, copy))

    def _migrate(self, db: sqlite3.Connection, last: int | None = None) -> None:
        """Migrate the schema to today's version, or to the migration `last`, in one transaction."""
        with _transaction(db):  # if many processes open a new file, they enter here one at a time
            version = self._version(db)
            db.create_function("renamed_config", 1, renamed_json)
            for number, script in _migrations():
                if version < number <= (last or number):
                    for statement in _statements(script.read_text(encoding="utf-8")):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {number}")
                    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")

    def _version(self, db: sqlite3.Connection | None = None) -> int:
        """The file's schema version, 0 if it is new. Raises StoreError if it is not ours or its schema is newer."""
        db = db or self._db
        version, application = (
            int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("user_version", "application_id")
        )
        tables = db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table'")
        if application != APPLICATION_ID and (application or version or tables.fetchone()):
            raise StoreError(
                f"{self.path} is a SQLite database of another program and was left unchanged: "
                "set PARALLAX_GEN_DB to another file"
            )
        if version > (newest := _migrations()[-1][0]):
            raise StoreError(
                f"{self.path} has schema {version}, but this parallax_gen reads only up to {newest}: "
                "upgrade parallax_gen, or set PARALLAX_GEN_DB to another file"
            )
        return version

    @contextmanager
    def _access(self) -> Iterator[None]:
        """One thread at a time uses the database; errors of SQLite and the file system become a StoreError."""
        try:
            with self._turn:
                yield
        except sqlite3.ProgrammingError:  # a bug of ours, such as reading a closed store
            raise
        except (sqlite3.OperationalError, OSError) as error:
            raise StoreError(
                f"cannot use the tuning database {self.path}: {error}. PARALLAX_GEN_DB can name a file elsewhere."
            ) from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the message may not be UTF-8
            raise StoreError(
                f"{self.path} is damaged or not a tuning database: {error}. "
                "Move it away, so that a new one is created, or set PARALLAX_GEN_DB to another file."
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if self.read_only:
            raise StoreError(f"{self.path} was opened read-only: it cannot be changed")
        with self._access(), _transaction(self._db):
            yield

    def _stored(self, result: Result) -> Result | None:
        """The stored result of the same identity."""
        return next(self._select(SAME_IDENTITY, identity_of(result)), None)

    def _save(self, result: Result, old: Result | None) -> None:
        if old is None or supersedes(result, old):
            self._upsert(result, old)

    def _upsert(self, result: Result, old: Result | None) -> None:
        """Replace the row of `old`, whose trial number remains."""
        if old is not None and old.trial is not None:
            result = replace(result, trial=old.trial)
        self._writer.table("measurements").upsert(to_row(result), pk=IDENTITY)

    def _next_trial(self, place: Place) -> int:
        query = "SELECT max(trial) FROM measurements WHERE place_json = ? AND typeof(trial) = 'integer' AND trial < ?"
        (last,) = self._db.execute(query, (place.text, MAX_INT)).fetchone()
        return 1 + (last or 0)

    def _of_place(self, place: Place, tables: sqlite3.Connection) -> Iterator[Result]:
        return self._parsed(_measurements(tables, "place_json = ?", (place.text,)))

    def _select(self, where: str, arguments: Arguments = ()) -> Iterator[Result]:
        """The results of the rows that match and parse."""
        return self._parsed(_measurements(self._tables, where, arguments))

    def _parsed(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Result]:
        """The results of the rows that parse. Other rows are counted and skipped."""
        for row in rows:
            try:
                yield from_row(row)
            except (*MALFORMED, KeyError):  # KeyError: a missing column
                self._unreadable.add(tuple(row.get(name) for name in IDENTITY))


def _measurements(db: sqlite3.Connection, where: str, arguments: Arguments) -> Iterator[dict[str, Any]]:
    """The rows of results that match; none in a new file. Raises sqlite3.DatabaseError for a view in their place."""
    kinds = [row[0] for row in db.execute("SELECT type FROM sqlite_master WHERE name = 'measurements'")]
    if kinds and kinds != ["table"]:
        raise sqlite3.DatabaseError(f"measurements is a {kinds[0]}, not a table")
    return _rows(db, f"SELECT * FROM measurements WHERE {where}", arguments) if kinds else iter(())


def _rows(db: sqlite3.Connection, query: str, arguments: Arguments = ()) -> Iterator[dict[str, Any]]:
    """A query's rows by column."""
    cursor = db.execute(query, arguments)
    names = [column[0] for column in cursor.description]
    return (dict(zip(names, row, strict=True)) for row in cursor)


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """An exclusive transaction: IMMEDIATE takes the write lock before anything is read."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.commit()
    finally:
        db.rollback()  # does nothing after a commit


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    missing = mode == "mode=ro" and not path.exists()
    uri = "file::memory:" if missing else f"{path.absolute().as_uri()}?{mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, check_same_thread=mode == "mode=rwc")
    connection.text_factory = _decode
    return connection


def _decode(raw: bytes) -> str:
    """Text that is not UTF-8 makes its own row unreadable, but the query succeeds."""
    return raw.decode(errors="replace")


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, one by one: running the whole script would end the enclosing transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _migrations() -> list[tuple[int, Path]]:
    """(number, file), ascending."""
    files = sorted((data_dir("tuning_db") / "migrations").glob("[0-9][0-9][0-9][0-9]_*.sql"))
    return [(int(file.name[:4]), file) for file in files]
