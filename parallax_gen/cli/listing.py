"""`parallax-gen list`: the config that calls get for each kernel and bucket of sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from parallax_gen.cli.options import complete_gpu, json_option
from parallax_gen.cli.text import print_json, print_table
from parallax_gen.describe import LEGEND, brief, gain_text, number, seqlen_text
from parallax_gen.problem.spec import PUBLIC_OPS
from parallax_gen.problem.work import rate, rate_unit

if TYPE_CHECKING:
    from parallax_gen.memory.descriptions import ListLine, Origins


@click.command("list")
@click.option("--gpu", metavar="NAME", shell_complete=complete_gpu, help="Such as h100 or h200. Default: all.")
@click.option("--op", type=click.Choice(PUBLIC_OPS), help="Default: all.")
@click.option("--all", "every", is_flag=True, help="List every config that was tried, not only those that calls get.")
@json_option
def list_known(gpu: str | None, op: str | None, every: bool, as_json: bool) -> None:
    """List the configs that calls get, by kernel and sizes.

    \b
    Example
      parallax-gen list --gpu h200 --op decode
    """
    from parallax_gen.memory.descriptions import (
        Origins,
        choices_of_places,
        name_in_records,
        open_memory,
        results_of_places,
    )
    from parallax_gen.memory.ranking import RecordTable

    memory = open_memory()
    results = memory.all()
    table = RecordTable(results)
    if gpu is not None:
        name = name_in_records(gpu, results)
        results = [r for r in results if r.place.gpu == name]
    if op is not None:
        results = [r for r in results if r.place.spec.public_op == op]
    lines = results_of_places(results) if every else choices_of_places(results, table)
    origins = Origins(memory)
    if as_json:
        print_json({"records": [_to_json(line, origins) for line in lines]})
    elif lines:
        _print(lines, origins)
        if not every:
            by_evidence = Counter(line.evidence_with_mark for line in lines).most_common()
            click.echo(", ".join(f"{evidence}: {count}" for evidence, count in by_evidence))
    else:
        click.echo("there are no results yet: run parallax-gen tune; until then calls get default configs")


def _print(lines: Iterable[ListLine], origins: Origins) -> None:
    """Print one table per kernel, then the legend."""
    for (gpu, spec), group in groupby(lines, key=lambda line: (line.place.gpu, line.place.spec)):
        kernel_lines = list(group)
        click.echo(f"{gpu}: {spec}")
        numbers = ("BxH", "seqlen", "us", rate_unit(spec.public_op), "gain")
        columns = (*numbers, "config", "status", "evidence")
        print_table(columns, [_line(line, origins) for line in kernel_lines], right=numbers)
        click.echo()
    click.echo(LEGEND)
    click.echo("us: microseconds; gain: the default config's time divided by this time, if both are of one Triton;")
    click.echo(
        "status: measured (by you), shipped (measured elsewhere), predicted (calls never use it), or how it failed;"
    )
    click.echo("evidence: the Triton that it was measured with, and the card if it was another of the same capability;")
    click.echo("not yet checked: a first call compiles it, and drops it if it spills far more than the default;")
    click.echo("parallax-gen explain says why calls get this config")


def _line(line: ListLine, origins: Origins) -> tuple[str, ...]:
    from parallax_gen.memory.descriptions import shape_of

    result, timing = line.result, ("-", "-")
    if result.time_us:
        timing = number(result.time_us), number(rate(result.place.spec, shape_of(result), result.time_us))
    bucket, config, status = line.place.bucket, brief(result.config), origins.status(result)
    sizes = str(bucket.kv_rows), seqlen_text(bucket)
    return *sizes, *timing, gain_text(line.gain), config, status, line.evidence_with_mark


def _to_json(line: ListLine, origins: Origins) -> dict[str, Any]:
    return origins.to_json(line.result) | {
        "of_place": line.place.flat(),
        "counts_as": line.evidence,
        "checked": line.checked,
        "default_us": line.default and line.default.time_us,
        "gain": line.gain,
    }
