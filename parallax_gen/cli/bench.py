"""`parallax-gen bench`: times our kernels against softmax attention and other Parallax kernels on this card."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from parallax_gen.bench.baselines import BASELINES, BATCH_INVARIANT, OURS
from parallax_gen.bench.cases import CaseError, Lengths, cases_of, quick_cases
from parallax_gen.bench.plots import draw, picture_error
from parallax_gen.bench.results_csv import ResultsCsv
from parallax_gen.bench.rows import FULL_EFFORT, GRID_EFFORT, QUICK_EFFORT, Conditions, Row, to_json
from parallax_gen.bench.summary import condition_lines, mean_lines, notes_of, table_of, title
from parallax_gen.cli.options import check_flags, flag_options, json_option, parse_head_dim, shape_option
from parallax_gen.cli.text import console, print_json, print_table, print_text
from parallax_gen.codegen import device
from parallax_gen.describe import number
from parallax_gen.errors import MeasureError
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import DTYPES, KernelSpec
from parallax_gen.problem.workloads import BENCH_GRIDS, DEFAULT_SHAPES, USUAL_HEAD_DIM, Flags, Sizes, kernels

HOST_SHAPE = Shape(1, 8, 8, 1, 4096)  # little work on the device, so that the host's time dominates


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
    help="Repeatable. Default: forward and decode; with --grid the grid's ops.",
)
@click.option(
    "--head-dim",
    type=parse_head_dim,
    metavar="N",
    help="Head dimension of every --shape, 128 by default. Without --shape: only the usual shapes with it.",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="bf16", show_default=True)
@shape_option(multiple=True, more_help="Repeatable. Default: the usual shapes.")
@click.option(
    "--grid",
    type=click.Choice(tuple(BENCH_GRIDS)),
    help="A set of shapes, instead of --shape. parallax-kernel, serving: decode. training: the usual training steps of "
    "every head_dim. paper: decode and training at batch 1 to 2048 with 128 to 32768 keys.",
)
@partial(flag_options, for_bench=True)
@click.option(
    "--lengths",
    type=parse_lengths,
    metavar="LENGTHS",
    help="Only with --op decode; implies --ragged. Keys of each sequence, such as 4096,7x128 (one of 4096, seven of "
    "128), in caches of the shape's length. Or a pattern for every shape: spread, from all keys down to a 32nd; skewed,"
    " one sequence with all keys and the others with a 32nd.",
)
@click.option(
    "--only", type=click.Choice(tuple(BASELINES)), multiple=True, metavar="NAME", help="Repeatable: only these."
)
@click.option(
    "--skip", type=click.Choice(tuple(BASELINES)), multiple=True, metavar="NAME", help="Repeatable: all but these."
)
@click.option("--quick", is_flag=True, help="Fewer shapes, less time for each: a first look, not for publication.")
@click.option(
    "--oracle",
    type=click.Choice(("whole", "sample", "none")),
    help="How much of each result to compare with the oracle; sample: the first and last sequence and kv head. "
    "Default: sample with --grid or --quick, else whole.",
)
@click.option("--host", is_flag=True, help="Instead measure the host time of a decode step and of its launch.")
@click.option(
    "--csv",
    "csv_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append the rows of each shape to this file. Rows that are already in it are not timed again.",
)
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also draw decode's speed-ups as PNG, SVG or PDF.",
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

    All kernels run in one process on the same inputs; errors are relative to an fp64 oracle. "peaked" is the output's
    error on queries that give most of their weight to one key, neither the first nor their own. With --op training the
    forward, the backward and both are timed, through torch's autograd; "error" is the largest of output and gradients.
    Softmax has half the matmuls of Parallax. A baseline that is not installed, or has no such kernel, gets a note
    instead of a time.

    With --batch-invariant our functions are also timed with batch_invariant=True: what it costs.

    A shape that does not fit the card's memory is skipped. After Ctrl-C the same command with the same --csv continues:
    rows of the same card, versions, kernels and settings are not timed again.

    With --grid or --quick, baselines that take three times as long as ours are timed with few calls, and the Triton
    kernels of parallax-kernel autotune with few calls per config, as autotuning takes minutes per training shape. Its
    Helion kernels are not tuned unless HELION_AUTOTUNE_EFFORT is set: "full" takes minutes per shape.

    \b
    Baselines
      SDPA flash, SDPA cuDNN, flash-attn 2, flash-attn 3, flash-attn 4,
      parallax-kernel CuTeDSL, parallax-kernel Triton, parallax-kernel Helion,
      fla, parallax_gen, batch-invariant

    \b
    Example
      parallax-gen bench --op decode --shape 32,8,4096 --shape 1,32/8,16384
      parallax-gen bench --op training --shape 4,16,4096 --window 1024
      parallax-gen bench --grid paper --csv paper.csv
      parallax-gen bench --grid serving --skip fla --picture serving.png
      parallax-gen bench --shape 8,32/8,4096 --lengths 4096,7x128
      parallax-gen bench --grid serving --ragged --page-size 0 --page-size 16
      parallax-gen bench --grid serving --batch-invariant --only parallax_gen
    """
    if lengths is not None:
        ops, flags = ops or ("decode",), replace(flags, per_sequence_lengths=True)
        if host or ops != ("decode",):
            raise click.UsageError("--lengths needs --op decode, and no --host")
    ops = ("decode",) if host else ops or (tuple(BENCH_GRIDS[grid]) if grid else ("forward", "decode"))
    check_flags(replace(flags, page_size=max(page_sizes, default=0)), ops)
    if grid and (shapes or not set(ops) <= set(BENCH_GRIDS[grid])):
        raise click.UsageError(f"--grid {grid} needs --op {' or '.join(BENCH_GRIDS[grid])}, and no --shape")
    if picture is not None:
        if ops != ("decode",):
            raise click.UsageError("--picture needs --op decode")
        if reason := picture_error(picture):
            raise click.UsageError(reason)
    names = [name for name in only or BASELINES if name not in skip]
    if flags.batch_invariant and not host:  # one more of the baselines, at the same cases
        flags, names = replace(flags, batch_invariant=False), list(dict.fromkeys((OURS, BATCH_INVARIANT, *names)))
    elif BATCH_INVARIANT not in only:
        names = [name for name in names if name != BATCH_INVARIANT]
    try:
        cases = list(cases_of(ops, head_dim, dtype, shapes, grid, flags, page_sizes, lengths))
    except CaseError as error:
        raise click.UsageError(str(error)) from error
    if not names:
        raise click.UsageError("--only and --skip leave no baseline to time")
    card = device.gpu_here(0)
    if card is None:
        raise MeasureError("there is no CUDA device here, so nothing can be timed")
    from parallax_gen.bench.compare import time_cases
    from parallax_gen.bench.conditions import current_conditions
    from parallax_gen.memory.descriptions import open_memory

    effort = QUICK_EFFORT if quick else GRID_EFFORT if grid else FULL_EFFORT
    command = shlex.join(["parallax-gen", *sys.argv[1:]])
    conditions = current_conditions(card, replace(effort, oracle=oracle or effort.oracle), command)
    if host:
        shape = shapes[0].for_op("decode") if shapes else HOST_SHAPE
        flags = replace(flags, page_size=page_sizes[0] if page_sizes else 0)
        _bench_host(*kernels("decode", head_dim or USUAL_HEAD_DIM, dtype, shape, flags)[0], conditions, as_json)
        return
    rows: list[Row] = []
    cases = quick_cases(cases, card) if quick else cases
    results, status = ResultsCsv(csv_file), console(stderr=True).status
    try:
        for case_rows in time_cases(cases, names, card, conditions, results, open_memory(), status):
            rows += case_rows
            if case_rows and not as_json:
                _print_rows(case_rows)
    except KeyboardInterrupt:
        if csv_file is not None:
            click.echo(f"stopped: the timed rows are in {csv_file}; the same command continues from there", err=True)
        raise
    if picture is not None:
        draw(picture, rows, f"{conditions.card}, {conditions.versions}\n{conditions.command}")
    if as_json:
        print_json({**conditions.flat(), "rows": [to_json(row) for row in rows]})
    else:
        for line in mean_lines(rows):
            print_text(line)
        for line in condition_lines(conditions, rows):
            print_text(line)
        click.echo(conditions.command)


def _print_rows(rows: list[Row]) -> None:
    """Print the table of one case, a line per baseline."""
    first, notes = rows[0], {row.note for row in rows}
    quick = first.conditions is not None and first.conditions.effort.quick
    print_text(title(first.op, first.spec, first.shape, first.lengths) + " (quick)" * quick)
    if len(notes) == 1 and not any(row.time_us for row in rows):
        print_text(first.note)
    else:
        columns, lines = table_of(rows)
        print_table(columns, lines, right=columns[1:])
        for note in notes_of(rows):
            print_text(note)
    click.echo()


def _bench_host(spec: KernelSpec, shape: Shape, conditions: Conditions, as_json: bool) -> None:
    from parallax_gen.bench.host import LABELS, host_times

    times = host_times(spec, shape)
    if as_json:
        without_effort = {name: value for name, value in vars(conditions).items() if name != "effort"}
        print_json({"spec": spec.to_dict(), "shape": shape.to_dict(), **without_effort, "host_us": times})
        return
    click.echo(f"{spec}: {shape}")
    print_table(("", "host us per call"), [(LABELS[name], number(time_us)) for name, time_us in times.items()])
    click.echo(f"{conditions.card}\n{conditions.versions}\n{conditions.command}")
