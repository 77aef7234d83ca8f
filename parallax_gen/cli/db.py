"""`parallax-gen db`: inspects, exports, imports and prunes the tuning database."""

from __future__ import annotations

import os
from collections import Counter
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parallax_gen.cli.options import json_option
from parallax_gen.cli.text import print_json, print_table, print_text
from parallax_gen.describe import format_counts
from parallax_gen.errors import StoreError
from parallax_gen.problem.spec import PUBLIC_OPS

if TYPE_CHECKING:
    from parallax_gen.memory.lines import ParsedRecords
    from parallax_gen.memory.result import Result
    from parallax_gen.memory.store import Store

SHOWN_BAD_LINES = 5

gpu_filter = click.option("--gpu", metavar="NAME", help="Only rows of this GPU, such as h100.")
op_filter = click.option("--op", type=click.Choice(PUBLIC_OPS), help="Only rows of this op.")


@click.group()
def db() -> None:
    """Inspect, export, import and prune the tuning database.

    It contains your own results. Shipped records are files of the package: see parallax-gen list.

    \b
    Example
      parallax-gen db stats
    """


@db.command()
@json_option
def path(as_json: bool) -> None:
    """Print the path of the database.

    Standard output has only the path. Standard error says where the path comes from.

    \b
    Example
      parallax-gen db path
    """
    from parallax_gen.memory.store import default_path

    file, variable = default_path(), os.environ.get("PARALLAX_GEN_DB")
    if as_json:
        print_json({"path": str(file), "exists": file.exists(), "PARALLAX_GEN_DB": variable or None})
        return
    click.echo(file)
    origin = f"PARALLAX_GEN_DB is {variable}" if variable else "PARALLAX_GEN_DB is not set, so this is the default"
    click.echo(origin + ("" if file.exists() else "; not yet created"), err=True)


@db.command()
@json_option
def stats(as_json: bool) -> None:
    """Count the rows of the database.

    Counts rows by GPU, op and outcome, and by toolchain. Also prints the database's size.

    Calls use rows of another Triton or ptxas if this toolchain has none, and if today's templates still render their
    kernels.

    \b
    Example
      parallax-gen db stats
    """
    from rich.filesize import decimal

    from parallax_gen.memory.descriptions import by_kernel, by_toolchain
    from parallax_gen.memory.store import Store

    with Store(read_only=True) as store:
        results = store.all()
        counts: dict[str, Any] = {
            "path": str(store.path),
            "exists": store.path.exists(),
            "bytes": _bytes_of(store),
            "schema": store.schema,
            "rows": len(results),
            "unreadable": store.unreadable,
            "kernels": by_kernel(results),
            "toolchains": by_toolchain(results),
        }
    if as_json:
        print_json(counts)
        return
    print_text(f"{counts['path']}: {_rows(len(results))}, {decimal(counts['bytes'])}, schema {counts['schema']}")
    if counts["unreadable"]:
        print_text(f"{_rows(counts['unreadable'])} cannot be read: parallax-gen db check says why")
    for gpu in dict.fromkeys(kernel["gpu"] for kernel in counts["kernels"]):
        click.echo(f"\n{gpu}")
        kernels = [kernel for kernel in counts["kernels"] if kernel["gpu"] == gpu]
        table = [(kernel["op"], str(kernel["rows"]), format_counts(kernel["outcomes"])) for kernel in kernels]
        print_table(("op", "rows", "outcomes"), table, right=("rows",))
    if results:
        click.echo("\ntoolchains, newest first")
        columns = ("newest", "rows", "of today's kernels", "ops", "toolchain")
        print_table(columns, map(_toolchain_line, counts["toolchains"]), right=("rows", "of today's kernels"))


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def _bytes_of(store: Store) -> int:
    """The size of the file and its write-ahead log."""
    files = (store.path, Path(f"{store.path}-wal"))
    return sum(file.stat().st_size for file in files if file.exists())


def _toolchain_line(counts: dict[str, Any]) -> tuple[str, ...]:
    here = " (this one)" if counts["here"] else ""
    toolchain = f"Triton {counts['triton']}, ptxas {counts['cuda'] or 'unknown'}{here}"
    rows = str(counts["rows"]), str(counts["of_todays_kernels"])
    return counts["newest"][:10], *rows, ", ".join(counts["ops"]), toolchain


@db.command("export")
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path))
@gpu_filter
@op_filter
@click.option("--measured", is_flag=True, help="Only measured results: no failures, no predictions.")
def export_rows(file: Path, gpu: str | None, op: str | None, measured: bool) -> None:
    """Write your results to a file, as lines of JSON.

    FILE - means standard output. Results of the newest toolchain come first. parallax-gen db import reads the file on
    any machine.

    \b
    Example
      parallax-gen db export mine.jsonl --gpu h200 --measured
    """
    from parallax_gen.memory.lines import is_database, to_line, write_lines
    from parallax_gen.memory.result import newest_toolchain_first
    from parallax_gen.memory.store import Store

    if is_database(file):
        raise StoreError(f"{file} is a database and is not overwritten: choose another file")
    with Store(read_only=True) as store:
        results = [r for r in _selected(store.all(), gpu, op) if r.measured or not measured]
        unreadable = store.unreadable
    to_stdout = str(file) == "-"
    if to_stdout:
        for result in newest_toolchain_first(results):
            click.echo(to_line(result), nl=False)
    else:
        write_lines(file, newest_toolchain_first(results))
    print_text(f"{'standard output' if to_stdout else file}: {_rows(len(results))}", err=to_stdout)
    if unreadable:
        print_text(f"left out {_rows(unreadable)} that cannot be read: parallax-gen db check says why", err=True)


def _selected(results: list[Result], gpu: str | None, op: str | None) -> list[Result]:
    """The results of a GPU and an op. Raises UnknownGpuError for an unknown GPU."""
    from parallax_gen.memory.descriptions import name_in_records

    name = None if gpu is None else name_in_records(gpu, results)
    return [r for r in results if name in (None, r.place.gpu) and op in (None, r.place.spec.public_op)]


@db.command("import")
@click.argument(
    "files",
    metavar="FILE...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
)
@click.option("--skip-bad", is_flag=True, help="Skip lines that are not valid results, instead of importing nothing.")
def import_rows(files: tuple[Path, ...], skip_bad: bool) -> None:
    """Add results from other machines to your database.

    FILE is a file from db export, - for standard input, or another database. All results are checked before any is
    added. Of two results for one config of one kernel the more informative one is kept (a time or a wrong result before
    a crash, a crash before a prediction), else the newer one. Results of other toolchains are kept too, and calls use
    them where this toolchain has none. Importing a file twice changes nothing.

    \b
    Example
      parallax-gen db import colleague.jsonl old/tuning.db
    """
    from parallax_gen.memory.descriptions import card_of
    from parallax_gen.memory.ranking import is_rendered
    from parallax_gen.memory.result import newest_toolchain_first
    from parallax_gen.memory.store import Store

    sources = [_read(file) for file in files]
    results = newest_toolchain_first(result for source in sources for result in source.results)
    bad = [problem for source in sources for problem in source.problems]
    if bad:
        _print_bad(bad)
        if not skip_bad:
            counts = f"{len(bad)} of {len(bad) + len(results)} are not valid results"
            raise StoreError(f"nothing was imported: {counts}; --skip-bad skips them")
    with Store() as store:
        merged = store.merge(results)
    skipped = f", {len(bad)} skipped" if bad else ""
    print_text(f"{store.path}: {merged.new} new, {merged.replaced} replaced, {merged.kept} kept{skipped}")
    unused = sum(not is_rendered(result, card_of(result.place)) for result in results)
    if unused:
        print_text(f"{unused} of kernels that are no longer rendered: calls ignore them; tuning starts from them")


def _read(file: Path) -> ParsedRecords:
    from parallax_gen.memory.lines import read_file, read_lines

    if str(file) != "-":
        return read_file(file)
    with click.open_file("-", "rb") as lines:
        return read_lines("standard input", lines)


def _print_bad(bad: list[str]) -> None:
    for problem in bad[:SHOWN_BAD_LINES]:
        click.echo(problem, err=True)
    if len(bad) > SHOWN_BAD_LINES:
        click.echo(f"and {len(bad) - SHOWN_BAD_LINES} more", err=True)


@db.command()
@click.option(
    "--other-environments",
    is_flag=True,
    help="Rows of another toolchain (which calls may use), and rows of other kernels than today's.",
)
@click.option("--failures", is_flag=True, help="Configs that failed; tune may then try them again.")
@click.option("--predicted", is_flag=True, help="Configs that were never run.")
@click.option("--older-than", type=click.IntRange(0, 36500), metavar="DAYS", help="Only rows that are older than this.")
@gpu_filter
@op_filter
@click.option("--dry-run", is_flag=True, help="Delete nothing: only print what would be deleted.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def prune(
    other_environments: bool,
    failures: bool,
    predicted: bool,
    older_than: int | None,
    gpu: str | None,
    op: str | None,
    dry_run: bool,
    yes: bool,
) -> None:
    """Delete rows of the kinds that you name, and keep a copy.

    Deletes rows of any of the named kinds; with only --older-than, of every kind. First writes them to a file in the
    database's folder, which db import can read.

    \b
    Example
      parallax-gen db prune --other-environments --older-than 90 --dry-run
    """
    from parallax_gen.memory.descriptions import rows_of_kinds
    from parallax_gen.memory.lines import write_lines
    from parallax_gen.memory.store import Store, default_path

    if older_than is None and not (other_environments or failures or predicted):
        raise click.UsageError("give one or more of --other-environments, --failures, --predicted, --older-than DAYS")
    now = datetime.now(timezone.utc)
    before = None if older_than is None else now - timedelta(days=older_than)
    if not default_path().exists():
        raise StoreError(f"{default_path()} is not yet created: there is nothing to delete")
    with Store(read_only=dry_run) as store:
        rows = store.all()
        kinds = {"other_environments": other_environments, "failures": failures, "predicted": predicted}
        to_delete = rows_of_kinds(_selected(rows, gpu, op), before, **kinds)
        if not to_delete:
            print_text(f"{store.path}: none of its {_rows(len(rows))} is selected")
            return
        selection = (
            f"{len(to_delete)} of {_rows(len(rows))} ({format_counts(Counter(row.outcome for row in to_delete))})"
        )
        if dry_run:
            print_text(f"{store.path}: {selection} would be deleted")
            return
        if not yes:
            click.confirm(f"{store.path}: delete {selection}?", abort=True)
        backup = store.path.with_name(f"{store.path.name}.pruned-{now:%Y%m%dT%H%M%S}-{os.getpid()}.jsonl")
        write_lines(backup, to_delete)
        deleted = store.delete(to_delete)
    print_text(f"{store.path}: {_rows(deleted)} deleted; they are in {backup}")


@db.command()
@json_option
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Check the database: its file, its schema and every row.

    The exit status is 1 if there is a problem. A row that cannot be read is never used.

    \b
    Example
      parallax-gen db check
    """
    from parallax_gen.memory.store import Store, default_path

    file, schema, rows = default_path(), 0, 0
    try:
        with Store(read_only=True) as store:
            schema, problems, rows = store.schema, store.problems(), len(store.all())
    except StoreError as error:
        problems = [" ".join(str(error).split())]
    if as_json:
        print_json({"path": str(file), "sound": not problems, "schema": schema, "rows": rows, "problems": problems})
    else:
        state = f"problems: {len(problems)}" if problems else "sound" if file.exists() else "not yet created"
        print_text(f"{file}: {state}, schema {schema}, {_rows(rows)} readable")
        for problem in problems:
            print_text(f"  {problem}", indent="    ")
    ctx.exit(1 if problems else 0)
