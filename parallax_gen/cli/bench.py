"""`parallax-gen bench`: times our kernels against softmax attention and other Parallax kernels on this card."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from parallax_gen.bench.baselines import BASELINES, OURS
from parallax_gen.bench.cases import CaseError, Lengths, cases_of, quick_cases
from parallax_gen.bench.plots import draw, picture_error
from parallax_gen.bench.results_csv import ResultsCsv
from parallax_gen.bench.rows import FULL_EFFORT, GRID_EFFORT, QUICK_EFFORT, Conditions, Row, to_json
from parallax_gen.bench.summary import mean_lines, notes_of, table_of, title
from parallax_gen.cli.options import check_flags, flag_options, json_option, parse_head_dim, shape_option
from parallax_gen.cli.text import console, print_json, print_table
from parallax_gen.codegen import device
from parallax_gen.describe import number
from parallax_gen.errors import MeasureError
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import DTYPES, KernelSpec
from parallax_gen.problem.workloads import BENCH_GRIDS, DEFAULT_SHAPES, USUAL_HEAD_DIM, Flags, Sizes, kernels

QUICK_NOTE = ", quick: not to be quoted"
PROGRAM = "parallax-gen"
HOST_SHAPE = Shape(1, 8, 8, 1, 4096)  # little work, so that the host's time dominates


def parse_lengths(text: str) -> Lengths:
    """Parse --lengths. Raises BadParameter."""
    try:
        return Lengths.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.option(
    "--op",
    "ops",
    type=click.Choice(tuple(DEFAULT_SHAPES)),
    multiple=True,
    help="Repeatable. Default: forward and decode; a grid's own.",
)
@click.option(
    "--head-dim",
    type=parse_head_dim,
    metavar="N",
    help="Of every --shape, 128 by default; of the usual ones those of it.",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="bf16", show_default=True)
@shape_option(multiple=True, more_help="Repeatable. Default: the usual ones.")
@click.option(
    "--grid",
    type=click.Choice(tuple(BENCH_GRIDS)),
    help="Instead of --shape. official, serving: decode. training: the usual steps of every head_dim. "
    "paper: batch 1 to 2048, 128 to 32768 keys, decode and training.",
)
@partial(flag_options, layouts=True)
@click.option(
    "--lengths",
    type=parse_lengths,
    metavar="LENGTHS",
    help="Of --op decode alone, and brings --ragged along: each sequence's keys, such as 4096,7x128, in caches that "
    "hold the shape's. Or, of every shape, spread: from all keys down to a 32nd; skewed: one with all, the others "
    "with a 32nd.",
)
@click.option(
    "--only", type=click.Choice(tuple(BASELINES)), multiple=True, metavar="NAME", help="Repeatable: these alone."
)
@click.option(
    "--skip", type=click.Choice(tuple(BASELINES)), multiple=True, metavar="NAME", help="Repeatable: without these."
)
@click.option("--quick", is_flag=True, help="Fewer shapes, timed shortly: to look at, not to quote.")
@click.option(
    "--oracle",
    type=click.Choice(("whole", "sample", "none")),
    help="What errors are of: every result, those of the first and last sequence and kv head, or nothing. "
    "Default: sample with --grid or --quick, else whole.",
)
@click.option("--host", is_flag=True, help="Instead: the host's time of a decode step, and of the launches below it.")
@click.option(
    "--csv",
    "csv_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Add the rows to this file as they come; what it already has is not timed again.",
)
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), help="Also draw decode's speed-ups there (PNG, SVG)."
)
@json_option
def bench(
    ops: tuple[str, ...],
    head_dim: int | None,
    dtype: str,
    shapes: tuple[Sizes, ...],
    grid: str | None,
    flags: Flags,
    page_sizes: tuple[int, ...],
    lengths: Lengths | None,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    quick: bool,
    oracle: str | None,
    host: bool,
    csv_file: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Time our kernels against other Parallax kernels and softmax.

    All run in one process on the same inputs; errors are against an fp64 oracle. With --op training the forward, the
    backward and both together are timed, through torch's autograd. Softmax has half the matmuls of Parallax. A baseline
    that is not installed, or has no such kernel, is noted.

    A shape that does not fit the card's memory is skipped. After Ctrl-C the same command with the same --csv goes on:
    rows of the same card, versions, kernels and settings are not timed again.

    With --grid or --quick, baselines that take three times as long as ours are timed with few calls, and the official
    Triton kernels autotune with few calls per config; otherwise that takes minutes per training shape. The official
    Helion kernels are not tuned unless HELION_AUTOTUNE_EFFORT is set: "full" takes minutes per shape.

    \b
    Baselines
      SDPA flash, SDPA cuDNN, flash-attn 2, flash-attn 3, flash-attn 4,
      official CuTeDSL, official Triton, official Helion, fla, parallax_gen

    \b
    Example
      parallax-gen bench --op decode --shape 32,8,4096 --shape 1,32/8,16384
      parallax-gen bench --op training --shape 4,16,4096 --window 1024
      parallax-gen bench --grid paper --csv paper.csv
      parallax-gen bench --grid serving --skip fla --picture serving.png
      parallax-gen bench --shape 8,32/8,4096 --lengths 4096,7x128
      parallax-gen bench --grid serving --ragged --page-size 0 --page-size 16
    """
    if lengths is not None:
        ops, flags = ops or ("decode",), replace(flags, ragged=True)
        if host or ops != ("decode",):
            raise click.UsageError("--lengths: of --op decode alone, without --host")
    ops = ("decode",) if host else ops or (tuple(BENCH_GRIDS[grid]) if grid else ("forward", "decode"))
    check_flags(replace(flags, page_size=max(page_sizes, default=0)), ops)
    if grid and (shapes or not set(ops) <= set(BENCH_GRIDS[grid])):
        raise click.UsageError(f"--grid {grid}: of --op {' or '.join(BENCH_GRIDS[grid])}, without --shape")
    if picture is not None:
        if ops != ("decode",):
            raise click.UsageError("--picture: of --op decode alone")
        if why := picture_error(picture):
            raise click.UsageError(why)
    try:
        cases = list(cases_of(ops, head_dim, dtype, shapes, grid, flags, page_sizes, lengths))
    except CaseError as error:
        raise click.UsageError(str(error)) from error
    names = [name for name in only or BASELINES if name not in skip]
    if not names:
        raise click.UsageError("--only and --skip leave no baseline to time")
    card = device.gpu_here(0)
    if card is None:
        raise MeasureError("there is no CUDA device here: nothing can be timed")
    from parallax_gen.bench.conditions import conditions
    from parallax_gen.bench.run import time_cases
    from parallax_gen.memory.descriptions import open_memory

    effort = QUICK_EFFORT if quick else GRID_EFFORT if grid else FULL_EFFORT
    how = conditions(card, replace(effort, oracle=oracle or effort.oracle), shlex.join([PROGRAM, *sys.argv[1:]]))
    if host:
        shape = shapes[0].for_op("decode") if shapes else HOST_SHAPE
        flags = replace(flags, page_size=page_sizes[0] if page_sizes else 0)
        _bench_host(*kernels("decode", head_dim or USUAL_HEAD_DIM, dtype, shape, flags)[0], how, as_json)
        return
    rows: list[Row] = []
    cases, results, under_way = (
        quick_cases(cases, card) if quick else cases,
        ResultsCsv(csv_file),
        console(stderr=True).status,
    )
    try:
        for found in time_cases(cases, names, card, how, results, open_memory(), under_way):
            rows += found
            if found and not as_json:
                _print_rows(found)
    except KeyboardInterrupt:
        if csv_file is not None:
            click.echo(f"stopped: what was timed is in {csv_file}, and the same command goes on from there", err=True)
        raise
    if picture is not None:
        draw(picture, rows, f"{how.card}, {how.versions}\n{how.command}")
    if as_json:
        print_json({**how.flat(), "rows": [to_json(row) for row in rows]})
    else:
        for line in mean_lines(rows):
            click.echo(line)
        _print_conditions(how, rows)


def _print_rows(rows: list[Row]) -> None:
    """Print the table of one case, a line per baseline."""
    first, notes = rows[0], {row.note for row in rows}
    quick = first.conditions is not None and first.conditions.effort.quick
    click.echo(title(first.op, first.spec, first.shape, first.lengths) + " (quick)" * quick)
    if len(notes) == 1 and not any(row.time_us for row in rows):
        click.echo(first.note)
    else:
        columns, lines = table_of(rows)
        print_table(columns, lines, right=columns[1:])
        for note in notes_of(rows):
            click.echo(note)
    click.echo()


def _print_conditions(how: Conditions, rows: list[Row]) -> None:
    """Print the conditions of the times above."""
    click.echo(f"{how.card}\n{how.versions}")
    packages = {row.baseline: row.package for row in rows if row.time_us and row.package and row.baseline != OURS}
    for name, package in packages.items():
        click.echo(f"{name}: {package}")
    effort = how.effort
    rounds = "1 round" if effort.rounds == 1 else f"{effort.rounds} rounds"
    click.echo(
        f"medians of CUDA graph replays, warm L2: {rounds} of {effort.timed_ms:.0f} ms" + QUICK_NOTE * effort.quick
    )
    if effort.oracle == "sample":
        click.echo("errors are of the first and the last sequence and kv head")
    click.echo(how.command)


def _bench_host(spec: KernelSpec, shape: Shape, how: Conditions, as_json: bool) -> None:
    from parallax_gen.bench.host import host_times

    times = host_times(spec, shape)
    if as_json:
        where = {name: value for name, value in vars(how).items() if name != "effort"}
        print_json({"spec": spec.to_dict(), "shape": shape.to_dict(), **where, "host_us": times})
        return
    click.echo(f"{spec}: {shape}")
    print_table(("", "host us a call"), [(name, number(time_us)) for name, time_us in times.items()])
    click.echo(f"{how.card}\n{how.versions}\n{how.command}")
