"""`parallax-gen list`: what is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from parallax_gen.cli.options import complete_gpu, json_option
from parallax_gen.cli.text import LEGEND, brief, lengths, number, print_json, print_table, rate, rate_unit
from parallax_gen.problem.spec import OPS

if TYPE_CHECKING:
    from parallax_gen.cli.known import Origins
    from parallax_gen.memory.results import Result


@click.command("list")
@click.option("--gpu", metavar="NAME", shell_complete=complete_gpu, help="Such as h100 or h200. Default: all.")
@click.option("--op", type=click.Choice(OPS), help="Default: all.")
@click.option("--all", "every", is_flag=True, help="Every config that was tried, not just the best of each bucket.")
@json_option
def list_known(gpu: str | None, op: str | None, every: bool, as_json: bool) -> None:
    """List what is known: each kernel's best record, by sizes.

    \b
    Example
      parallax-gen list --gpu h200 --op decode
    """
    from parallax_gen.cli.known import Origins, name_in_records, open_memory

    memory = open_memory()
    results = memory.all()
    if gpu is not None:
        name = name_in_records(gpu, results)
        results = [r for r in results if r.key.gpu == name]
    if op is not None:
        results = [r for r in results if r.key.spec.op == op]
    if not every:
        results = [next(group) for _, group in groupby(results, key=lambda r: r.key)]  # sorted: the best come first
    origins = Origins(memory)
    if as_json:
        print_json({"records": [origins.to_json(r) for r in results]})
    elif results:
        _print(results, origins)
    else:
        click.echo("nothing is known yet: parallax-gen tune finds out; until then kernels get default configs")


def _print(results: Iterable[Result], origins: Origins) -> None:
    """A table a kernel and environment: those of this environment first."""
    from parallax_gen.cli.known import differences, unlike_here

    def table(result: Result) -> tuple[Any, ...]:
        unlike = tuple(differences(unlike_here(result.key)))
        return result.key.gpu, *asdict(result.key.spec).values(), unlike

    for (gpu, *_, unlike), group in groupby(sorted(results, key=table), key=table):
        rows = list(group)
        spec = rows[0].key.spec
        click.echo(f"{gpu}: {spec}")
        if unlike:
            click.echo(f"unused here: {', '.join(unlike)}")
        unit = rate_unit(spec.op)
        numbers = ("kv rows", "seqlen", "time us", unit)
        print_table((*numbers, "config", "known as"), [_row(r, origins) for r in rows], right=numbers)
        click.echo()
    click.echo(LEGEND)
    click.echo("known as: measured here, shipped (measured elsewhere), predicted (never used),")
    click.echo("or how it failed")


def _row(result: Result, origins: Origins) -> tuple[str, ...]:
    from parallax_gen.cli.known import shape_of

    key, timing = result.key, ("-", "-")
    if result.time_us:
        timing = number(result.time_us), number(rate(key.spec, shape_of(result), result.time_us))
    return str(key.bucket.kv_rows), lengths(key.bucket), *timing, brief(result.config), origins.status(result)
