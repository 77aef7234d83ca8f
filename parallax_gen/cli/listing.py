"""`parallax-gen list`: what is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from parallax_gen.cli.options import complete_gpu, json_option
from parallax_gen.cli.text import LEGEND, brief, lengths, number, print_json, print_table, rate, rate_unit
from parallax_gen.problem.spec import OPS

if TYPE_CHECKING:
    from parallax_gen.cli.known import Origins
    from parallax_gen.memory.place import Place
    from parallax_gen.memory.result import Result
    from parallax_gen.memory.shipped import Memory


@dataclass(frozen=True)
class Row:
    """A result that is listed for a place, and what it counts for there.

    tier  what a call at the place rests on, where the row is what it gets; else why the row is not used
    """

    place: Place
    result: Result
    tier: str


@click.command("list")
@click.option("--gpu", metavar="NAME", shell_complete=complete_gpu, help="Such as h100 or h200. Default: all.")
@click.option("--op", type=click.Choice(OPS), help="Default: all.")
@click.option("--all", "every", is_flag=True, help="Every config that was tried, not just what calls get.")
@json_option
def list_known(gpu: str | None, op: str | None, every: bool, as_json: bool) -> None:
    """List what is known: of each kernel and sizes, what calls get.

    \b
    Example
      parallax-gen list --gpu h200 --op decode
    """
    from parallax_gen.cli.known import Origins, name_in_records, open_memory

    memory = open_memory()
    results = memory.all()
    if gpu is not None:
        name = name_in_records(gpu, results)
        results = [r for r in results if r.place.gpu == name]
    if op is not None:
        results = [r for r in results if r.place.spec.op == op]
    rows = _every(results) if every else _of_places(results, memory)
    origins = Origins(memory)
    if as_json:
        told = [origins.to_json(row.result) | {"of_place": row.place.flat(), "counts_as": row.tier} for row in rows]
        print_json({"records": told})
    elif rows:
        _print(rows, origins)
        if not every:
            by = Counter(row.tier for row in rows).most_common()
            click.echo(", ".join(f"{tier}: {count}" for tier, count in by))
    else:
        click.echo("nothing is known yet: parallax-gen tune finds out; until then kernels get default configs")


def _of_places(results: list[Result], memory: Memory) -> list[Row]:
    """What calls get at each place; where that is the default, the best of what is known and not used."""
    from parallax_gen.cli.known import chosen, standing

    rows = []
    for place, group in groupby(results, key=lambda r: r.place):  # sorted: the best come first
        choice, first = chosen(place, memory), next(group)
        tier = standing(choice, place) if choice.record else "not used" if first.measured else "never measured"
        rows.append(Row(place, choice.record or first, tier))
    return rows


def _every(results: list[Result]) -> list[Row]:
    from parallax_gen.cli.known import AS_HERE, unlike_here

    return [Row(r.place, r, ", ".join(unlike_here(r)) or AS_HERE) for r in results]


def _print(rows: Iterable[Row], origins: Origins) -> None:
    """A table a kernel."""

    def table(row: Row) -> tuple[Any, ...]:
        return row.place.gpu, *asdict(row.place.spec).values()

    for (gpu, *_), group in groupby(rows, key=table):
        of_kernel = list(group)
        spec = of_kernel[0].place.spec
        click.echo(f"{gpu}: {spec}")
        numbers = ("kv rows", "seqlen", "time us", rate_unit(spec.op))
        print_table((*numbers, "config", "known as", "by"), [_row(row, origins) for row in of_kernel], right=numbers)
        click.echo()
    click.echo(LEGEND)
    click.echo("known as: measured here, shipped (measured elsewhere), predicted (never used), or how it failed;")
    click.echo("by: the Triton that it was measured with, and the card where it is a sibling;")
    click.echo("parallax-gen explain says why that is what calls get")


def _row(row: Row, origins: Origins) -> tuple[str, ...]:
    from parallax_gen.cli.known import shape_of

    result, timing = row.result, ("-", "-")
    if result.time_us:
        timing = number(result.time_us), number(rate(result.place.spec, shape_of(result), result.time_us))
    bucket = row.place.bucket
    return str(bucket.kv_rows), lengths(bucket), *timing, brief(result.config), origins.status(result), row.tier
