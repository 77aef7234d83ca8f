"""`parallax-gen list`: the config that calls get for each kernel and bucket of sizes."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parallax_gen.cli.models import ModelArgs, asked, asked_options
from parallax_gen.cli.options import (
    KernelArgs,
    chosen_gpu,
    complete_gpu,
    json_option,
    print_bucket,
    shape_option,
    without_mode,
)
from parallax_gen.cli.text import print_json, print_tables, print_text
from parallax_gen.errors import ArgumentError
from parallax_gen.problem.workloads import Sizes

if TYPE_CHECKING:
    from parallax_gen.memory.descriptions import ListLine, Origins
    from parallax_gen.memory.shipped import Memory
    from parallax_gen.problem.hardware import Gpu

TIERS = ("here", "toolchain", "sibling", "near", "default")  # report/listing.py's, which help must not import


@click.command("list")
@click.option("--gpu", metavar="NAME", shell_complete=complete_gpu, help="Such as h100 or h200. Default: all.")
@partial(asked_options, default="all; with --for ")
@shape_option(more_help="Only its bucket.")
@click.option("--tier", type=click.Choice(TIERS), help="Only configs that come from there, as the summary counts them.")
@click.option("--summary", is_flag=True, help="Print only the summary.")
@click.option("--all", "every", is_flag=True, help="List every config that was tried, not only those that calls get.")
@click.option(
    "--basket",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A JSON file of models and calls: print which share of its calls finds which kind of config on --gpu.",
)
@json_option
def list_known(
    gpu: str | None,
    model: ModelArgs | None,
    requested: KernelArgs,
    shape: Sizes | None,
    tier: str | None,
    summary: bool,
    every: bool,
    basket: Path | None,
    as_json: bool,
) -> None:
    """List the configs that calls get, by kernel and sizes.

    Begins with a summary: how many sizes of each kernel have a config that was measured on this card with this Triton,
    with another one, and so on; with --gpu also those that this card borrows from another. Options that select kernels
    or sizes leave out all others; with --model, lists all kernels of the model's steps.

    \b
    Example
      parallax-gen list --gpu h200 --op decode --head-dim 128
      parallax-gen list --gpu h200 --op training --summary
    """
    from parallax_gen.memory.descriptions import (
        Origins,
        borrowed_places,
        choices_of_places,
        name_in_records,
        open_memory,
    )
    from parallax_gen.memory.descriptions import results_of_places as all_results
    from parallax_gen.memory.ranking import RecordTable
    from parallax_gen.report.listing import TIER_WORDS, Filter, to_json

    if every and (tier or summary):
        raise click.UsageError("--all lists every config that was tried: leave out --tier and --summary")
    memory = open_memory()
    if basket is not None:
        _print_coverage(basket, chosen_gpu(gpu), memory, as_json)
        return
    results = memory.all()
    table = RecordTable(results)
    borrowed = []
    if gpu is not None:
        name = name_in_records(gpu, results)
        borrowed = borrowed_places(name, results)
        results = [r for r in results if r.place.gpu == name]
    places = list(dict.fromkeys([*(result.place for result in results), *borrowed]))
    if model is not None:
        places = asked(model, requested, [shape] if shape else []).places(chosen_gpu(gpu))
    else:
        if shape is not None:
            print_bucket(shape, (requested.op,) if requested.op else ("forward", "decode"))
        wanted = Filter(requested.op, requested.head_dim, requested.dtype, without_mode(requested.flags), shape)
        places = [place for place in places if wanted.matches(place)]
    if every:
        chosen = set(places)
        lines = all_results([r for r in results if r.place in chosen])
    else:
        lines = choices_of_places(sorted(places, key=lambda place: place.order), table)
        if model is None:  # a place without results is listed only for what it borrows
            lines = [line for line in lines if line.result]
        lines = [line for line in lines if tier is None or (line.tier and TIER_WORDS[line.tier] == tier)]
    origins = Origins(memory)
    if as_json:
        print_json({"records": [to_json(line, origins) for line in lines]})
    elif lines:
        _print(lines, origins, summary, every)
    elif results:
        print_text("no results of these kernels and sizes: calls get default configs, as parallax-gen explain shows")
    else:
        print_text("there are no results yet: run parallax-gen tune; until then calls get default configs")


def _print_coverage(path: Path, gpu: Gpu, memory: Memory, as_json: bool) -> None:
    from parallax_gen.problem.basket import basket_calls
    from parallax_gen.report.coverage import coverage, coverage_table
    from parallax_gen.report.listing import SUMMARY_LEGEND

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ArgumentError("--basket", f"{path}, which is not JSON ({error})", "a JSON file") from error
    found = coverage(basket_calls(data, str(path)), gpu, memory)
    if as_json:
        print_json({"gpu": gpu.name, "coverage": [part.to_json() for part in found]})
    else:
        print_tables([coverage_table(found, gpu)])
        print_text(SUMMARY_LEGEND)


def _print(lines: list[ListLine], origins: Origins, summary: bool, every: bool) -> None:
    from parallax_gen.describe import LEGEND as CONFIG_LEGEND
    from parallax_gen.report.listing import LEGEND, SUMMARY_LEGEND, kernel_tables, summary_tables

    if not every:
        print_tables(summary_tables(lines))
    if not summary:
        print_tables(kernel_tables(lines, origins))
        print_text(CONFIG_LEGEND)
        print_text(LEGEND)
    if not every:
        print_text(SUMMARY_LEGEND)
        by_evidence = Counter(line.evidence_with_mark for line in lines).most_common()
        print_text(", ".join(f"{evidence}: {count}" for evidence, count in by_evidence))
