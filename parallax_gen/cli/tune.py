"""`parallax-gen tune`: finds the best kernels and stores the results."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parallax_gen.cli.devices import card_to_tune, devices_option
from parallax_gen.cli.models import ModelArgs, confirm, model_options, print_plan
from parallax_gen.cli.options import (
    check_file,
    check_flags,
    flag_options,
    gpu_option,
    json_option,
    parse_head_dim,
    print_bucket,
    shape_option,
    without_mode,
)
from parallax_gen.cli.text import console, print_json, print_tables, print_text
from parallax_gen.describe import LEGEND
from parallax_gen.errors import MachineError, MeasureError
from parallax_gen.problem.spec import DTYPES
from parallax_gen.problem.workloads import GRIDS, NO_FLAGS, OPS_AND_TRAINING, Flags, Sizes

if TYPE_CHECKING:
    from parallax_gen.tuning.job import Job, Progress
    from parallax_gen.tuning.plan import Plan
    from parallax_gen.tuning.tuner import Tuner


@click.command()
@gpu_option
@model_options
@click.option(
    "--calls",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The kernels of the calls that PARALLAX_GEN_RECORD wrote to a file, the costliest first.",
)
@click.option(
    "--op",
    "ops",
    type=click.Choice(OPS_AND_TRAINING),
    multiple=True,
    help="Repeatable. training: the four kernels of a training step. Default: forward, decode and training.",
)
@click.option(
    "--head-dim",
    "head_dims",
    type=parse_head_dim,
    metavar="N",
    multiple=True,
    help="Repeatable. Default: 128; the usual training shapes have their own.",
)
@click.option("--dtype", "dtypes", type=click.Choice(DTYPES), multiple=True, help="Repeatable. Default: bf16.")
@shape_option(multiple=True, more_help="Repeatable; every op is tuned at each. Default: the usual shapes.")
@click.option("--refresh", is_flag=True, help="Time known configs again, without a search.")
@click.option("--grid", type=click.Choice(tuple(GRIDS)), help="A grid of decode shapes, instead of --op and --shape.")
@flag_options
@click.option(
    "--trials", type=click.IntRange(min=1), default=64, show_default=True, help="Configs per kernel and bucket."
)
@click.option(
    "--time-budget",
    type=click.FloatRange(min=0, min_open=True),
    default=45.0,
    show_default=True,
    help="Seconds per job.",
)
@click.option("--yes", is_flag=True, help="Do not ask before a tune that may take more than ten minutes.")
@click.option("--workers", type=click.IntRange(min=1), help="Compiling processes. Default: one per usable CPU.")
@devices_option
@click.option(
    "--storage",
    metavar="URL",
    help="Share the jobs with other machines' tuners: postgresql://user@host/name, or journal:FILE on a shared disk.",
)
@json_option
def tune(
    gpu: str | None,
    model: ModelArgs | None,
    calls: Path | None,
    ops: tuple[str, ...],
    head_dims: tuple[int, ...],
    dtypes: tuple[str, ...],
    shapes: tuple[Sizes, ...],
    refresh: bool,
    grid: str | None,
    flags: Flags,
    trials: int,
    time_budget: float,
    yes: bool,
    workers: int | None,
    devices: tuple[int, ...] | None,
    storage: str | None,
    as_json: bool,
) -> None:
    """Find the best kernels for a GPU, and store the results.

    With --model, tunes the kernels that a model calls: in training those of the layer or the converted model, in
    serving those of parallax_attn_with_kvcache and of generate. It first lists them, what is known of each and how long
    it takes at most; at the end, what each gained over its default, and a step. Llama-3.2-1B with 8 sequences of 8192
    keys, on one card: --model Llama-3.2-1B --serving --max-batch 8 --max-len 8192.

    With --calls, tunes the kernels that take the most time in a program that ran with PARALLAX_GEN_RECORD=FILE: by
    the number of their calls, and the measured or predicted time of each. Those that together take less than 1 % of the
    time are left out.

    Every finished trial is stored: Ctrl-C loses none, and the same command continues from there. Without a CUDA device,
    configs are compiled and ranked by a cost model, for --gpu or else an H200, and nothing is measured.

    --refresh is for a new Triton, driver or template. For each kernel and bucket with results (selected by --op,
    --head-dim and --dtype, or by --shape, --grid and flags) it times the few best configs and the default again, in a
    second or two.

    \b
    Usual shapes, as batch,heads,seqlen
      forward   4,16,4096  1,16,16384  16,16,1024  8,16,2048
      decode    8 heads: batch 1 and 32, with 1024, 4096 and 16384 keys
                32/8 heads: batch 1 and 32, with 8192 keys
      training  32,6,2048  32,10,2048  16,12,2048  4,16,4096  4,16/8,4096
                2,32/8,8192  1,16,16384; some also with --window 513 or 4096
                --head-dim 64: 8,32,2048  96: 4,32,4096  256: 2,8/4,4096

    \b
    Example
      parallax-gen tune --for serving --heads 32/8 --head-dim 128 --page-size 16
      parallax-gen tune --op decode --shape 32,32/8,8192
      parallax-gen tune --op training --shape 8,32/8,4096 --window 1024
      parallax-gen tune --grid serving --page-size 16
      parallax-gen tune --calls calls.jsonl
      parallax-gen tune --refresh --op decode
      parallax-gen tune --devices 0,1,2,3 --storage postgresql://me@host/tuning
    """
    from parallax_gen.memory.calls import read_calls
    from parallax_gen.memory.shipped import Memory
    from parallax_gen.memory.store import Store
    from parallax_gen.tuning.calls import plan_of_calls
    from parallax_gen.tuning.claims import Storage
    from parallax_gen.tuning.devices import free_devices
    from parallax_gen.tuning.job import DEFAULT_OPS, MAX_REFRESHED, grid_jobs, matches_filters, refresh_jobs, worklist
    from parallax_gen.tuning.plan import REFRESH_S, plan_of, times_after_tune
    from parallax_gen.tuning.summary import job_tables, times_tables, to_json
    from parallax_gen.tuning.tuner import Tuner, children

    if model and (ops or shapes or grid):
        raise click.UsageError("--model and --for choose kernels and sizes: leave out --op, --shape and --grid")
    chosen_flags = without_mode(flags) != NO_FLAGS
    if calls and (model or ops or shapes or grid or head_dims or dtypes or chosen_flags):
        raise click.UsageError("--calls has the kernels and sizes: leave out the options that choose them")
    if grid and (shapes or ops not in ((), ("decode",))):
        raise click.UsageError("--grid needs --op decode, and no --shape")
    if refresh and storage is not None:
        raise click.UsageError("--refresh cannot be combined with --storage: one process times its own records")
    model_steps = model.steps(head_dims, dtypes, flags) if model else None
    if calls:
        check_file("--calls", calls)
    counts = read_calls(calls) if calls else None
    all_places = refresh and not (model or calls or grid or shapes or chosen_flags)
    matches = functools.partial(matches_filters, ops=ops, head_dims=head_dims, dtypes=dtypes)
    ops = ("decode",) if grid else ops or DEFAULT_OPS
    check_flags(flags, ops)
    for sizes in shapes:
        print_bucket(sizes, ops)
    shapes_by_op = {op: [sizes.for_op(op) for sizes in shapes] for op in ops} if shapes else None
    dtypes = dtypes or ("bf16",)
    all_free = functools.partial(free_devices, name=gpu, say=functools.partial(print_text, err=True))
    with children(devices or all_free, workers) as (measuring, compilers), Store() as store:
        card, measure = card_to_tune(gpu, measuring)
        if not measure and (storage is not None or refresh):
            raise MeasureError(
                "--refresh: there is no CUDA device here to measure on"
                if refresh
                else "--storage: there is no CUDA device here, and predictions are not shared"
            )
        if counts is not None:
            plan: Plan | None = plan_of_calls(counts, card, Memory(store))
        else:
            plan = plan_of(*model_steps, card, Memory(store)) if model_steps else None
        if plan:
            jobs = plan.jobs
            seconds = plan.most_seconds(min(time_budget, REFRESH_S) if refresh else time_budget, len(measuring))
            print_plan(plan, seconds, len(measuring))
            confirm(seconds, yes)
        elif all_places:
            jobs = refresh_jobs(Memory(store), card, matches)
        elif grid:
            jobs = grid_jobs(card, GRIDS[grid], head_dims, dtypes, flags)
        else:
            jobs = worklist(card, ops=ops, head_dims=head_dims, dtypes=dtypes, shapes=shapes_by_op, flags=flags)
        if not jobs and all_places:
            raise MeasureError(f"--refresh: there are no results of these kernels on {card.name}: tune them first")
        if not jobs:
            raise click.UsageError("no usual shape has that --head-dim: give a --shape")
        tuner = Tuner(
            store,
            measure=measure,
            measuring=measuring,
            compilers=compilers,
            storage=None if storage is None else Storage(storage),
            refresh=Memory(store) if refresh else None,
        )
        with tuner:
            max_trials = min(trials, MAX_REFRESHED) if refresh else trials
            done = _tune_all(tuner, jobs, measure, max_trials, time_budget, store.path, len(measuring))
        times = times_after_tune(plan, done, Memory(store)) if plan else []
    if as_json:
        steps = {"steps": [step.to_json() for step in times]} if plan else {}
        print_json(to_json(done, card, measure, store.path) | steps)
    else:
        print_tables(times_tables(times, "best us" if measure else "predicted us") if plan else job_tables(done))
        print_text(LEGEND)
        click.echo(f"database: {store.path}")
    if not measure:
        print_text("nothing was measured: these times are predicted, and dispatch does not use them", err=True)
    if all(progress.best is None for progress in done):
        raise MeasureError("no config worked in any job: parallax-gen show says why each one failed")


def _tune_all(
    tuner: Tuner, jobs: list[Job], measure: bool, trials: int, time_budget: float, path: Path, devices: int
) -> list[Progress]:
    from parallax_gen.tuning.interrupt import Interrupt
    from parallax_gen.tuning.progress import ProgressView

    if not measure and not any(job.gpu.is_amd for job in jobs):  # those are refused
        print_text("no CUDA device here: compiling and ranking only, nothing will be measured (predicted)", err=True)
    interrupt = Interrupt()
    view = ProgressView(
        console(stderr=True), len(jobs), trials, time_budget, after_update=interrupt.check, devices=devices
    )
    try:
        with view, interrupt:
            return tuner.tune_all(jobs, trials=trials, time_budget_s=time_budget, watcher=view)
    except KeyboardInterrupt:
        print_text(f"stopped: all finished trials are stored in {path}; run again to continue", err=True)
        raise
    except MachineError as error:
        advice = "no config caused this, so it is not stored; once it is fixed, run again to continue"
        raise MachineError(f"{error}: {advice}") from error
