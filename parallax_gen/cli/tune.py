"""`parallax-gen tune`: finds the best kernels and stores the results."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from parallax_gen.cli.devices import card_to_tune, devices_option
from parallax_gen.cli.options import check_flags, flag_options, gpu_option, json_option, parse_head_dim, shape_option
from parallax_gen.cli.text import console, print_json, print_table
from parallax_gen.describe import LEGEND, brief, format_counts, number, seqlen_text
from parallax_gen.errors import MachineError, MeasureError
from parallax_gen.ops.base import config_to_dict
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.spec import DTYPES, KernelSpec
from parallax_gen.problem.work import rate, rate_unit
from parallax_gen.problem.workloads import GRIDS, NO_FLAGS, OPS_AND_TRAINING, STEP, TRAINING, Flags, Sizes

if TYPE_CHECKING:
    from pathlib import Path

    from parallax_gen.memory.place import Place
    from parallax_gen.memory.result import Outcome
    from parallax_gen.tuning.job import Job, Progress
    from parallax_gen.tuning.tuner import Tuner


@click.command()
@gpu_option
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
    ops: tuple[str, ...],
    head_dims: tuple[int, ...],
    dtypes: tuple[str, ...],
    shapes: tuple[Sizes, ...],
    refresh: bool,
    grid: str | None,
    flags: Flags,
    trials: int,
    time_budget: float,
    workers: int | None,
    devices: tuple[int, ...],
    storage: str | None,
    as_json: bool,
) -> None:
    """Find the best kernels for a GPU, and store the results.

    Every finished trial is stored: Ctrl-C loses none, and the same command continues from there. Without a CUDA device,
    configs are compiled and ranked by a model, and nothing is measured.

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
      parallax-gen tune --gpu h200 --op decode --shape 32,32/8,8192
      parallax-gen tune --gpu h200 --op training --shape 8,32/8,4096 --window 1024
      parallax-gen tune --gpu h200 --grid serving --page-size 16
      parallax-gen tune --gpu h200 --refresh --op decode
      parallax-gen tune --devices 0,1,2,3 --storage postgresql://me@host/tuning
    """
    from parallax_gen.memory.shipped import Memory
    from parallax_gen.memory.store import Store
    from parallax_gen.tuning.claims import Storage
    from parallax_gen.tuning.job import DEFAULT_OPS, MAX_REFRESHED, grid_jobs, refresh_jobs, worklist
    from parallax_gen.tuning.tuner import Tuner, children

    if grid and (shapes or ops not in ((), ("decode",))):
        raise click.UsageError("--grid needs --op decode, and no --shape")
    if refresh and storage is not None:
        raise click.UsageError("--refresh cannot be combined with --storage: one process times its own records")
    all_places = refresh and not (grid or shapes or flags != NO_FLAGS)
    matches = functools.partial(_matches_filters, ops=ops, head_dims=head_dims, dtypes=dtypes)
    ops = ("decode",) if grid else ops or DEFAULT_OPS
    check_flags(flags, ops)
    shapes_by_op = {op: [sizes.for_op(op) for sizes in shapes] for op in ops} if shapes else None
    dtypes = dtypes or ("bf16",)
    with children(devices, workers) as (measuring, compilers), Store() as store:
        card, measure = card_to_tune(gpu, measuring)
        if not measure and (storage is not None or refresh):
            raise MeasureError(
                "--refresh: there is no CUDA device here to measure on"
                if refresh
                else "--storage: there is no CUDA device here, and predictions are not shared"
            )
        if all_places:
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
            done = _tune_all(tuner, jobs, measure, max_trials, time_budget, store.path)
    path = store.path
    if as_json:
        print_json(_to_json(done, card, measure, path))
    else:
        _print(done, path)
    if not measure:
        click.echo("nothing was measured: these times are predicted, and dispatch does not use them", err=True)
    if all(progress.best is None for progress in done):
        raise MeasureError("no config worked in any job: parallax-gen show says why each one failed")


def _matches_filters(place: Place, *, ops: Sequence[str], head_dims: Sequence[int], dtypes: Sequence[str]) -> bool:
    """Whether a place matches the given filters; an empty filter matches everything."""
    spec = place.spec
    in_step = spec.public_op in STEP and (spec.stats or spec.public_op != "forward")
    return (
        (not ops or spec.public_op in ops or (TRAINING in ops and in_step))
        and (not head_dims or spec.head_dim in head_dims)
        and (not dtypes or spec.dtype in dtypes)
    )


def _tune_all(
    tuner: Tuner, jobs: list[Job], measure: bool, trials: int, time_budget: float, path: Path
) -> list[Progress]:
    from parallax_gen.cli.progress import Interrupt, ProgressView

    if not measure:
        click.echo("no CUDA device here: compiling and ranking only, nothing will be measured (predicted)", err=True)
    interrupt = Interrupt()
    view = ProgressView(console(stderr=True), len(jobs), trials, time_budget, after_update=interrupt.check)
    try:
        with view, interrupt:
            return tuner.tune_all(jobs, trials=trials, time_budget_s=time_budget, watcher=view)
    except KeyboardInterrupt:
        click.echo(f"stopped: all finished trials are stored in {path}; run again to continue", err=True)
        raise
    except MachineError as error:
        advice = "no config caused this, so it is not stored; once it is fixed, run again to continue"
        raise MachineError(f"{error}: {advice}") from error


def _print(done: list[Progress], path: Path) -> None:
    by_spec: dict[KernelSpec, list[Progress]] = {}
    for progress in done:
        by_spec.setdefault(progress.job.spec, []).append(progress)
    for spec, jobs in by_spec.items():
        click.echo(f"{jobs[0].job.gpu.name}: {spec}")
        unit = rate_unit(spec.op)
        columns = ("BxH", "seqlen", "time us", unit, "config", "trials", "failures")
        print_table(columns, [_line(progress) for progress in jobs], right=(*columns[:4], "trials"))
        click.echo()
    click.echo(LEGEND)
    click.echo(f"database: {path}")


def _line(progress: Progress) -> tuple[str, ...]:
    from parallax_gen.memory.descriptions import shape_of

    job, best = progress.job, progress.best
    result = ("-", "-", "-")
    if best is not None and best.time_us is not None:
        result = number(best.time_us), number(rate(job.spec, shape_of(best), best.time_us)), brief(best.config)
    failures = format_counts(_failures(progress)) or "none"
    return str(job.bucket.kv_rows), seqlen_text(job.bucket), *result, str(progress.done), failures


def _failures(progress: Progress) -> dict[Outcome, int]:
    return {outcome: count for outcome, count in progress.outcomes.items() if outcome.failed}


def _to_json(done: list[Progress], gpu: Gpu, measured: bool, path: Path) -> dict[str, Any]:
    return {
        "gpu": gpu.name,
        "measured": measured,
        "database": str(path),
        "jobs": [_job_to_json(progress) for progress in done],
    }


def _job_to_json(progress: Progress) -> dict[str, Any]:
    from parallax_gen.memory.descriptions import shape_of

    job, best = progress.job, progress.best
    time_us = best.time_us if best else None
    return {
        "spec": job.spec.to_dict(),
        "bucket": job.bucket.to_dict(),
        "shape": job.shape.to_dict(),
        "outcome": best.outcome.value if best else None,
        "config": config_to_dict(best.config) if best else None,
        "time_us": time_us,
        "rate": rate(job.spec, shape_of(best), time_us) if best and time_us else None,
        "rate_unit": rate_unit(job.spec.op),
        "trials": progress.done,
        "known": progress.known,
        "elsewhere": progress.other_tuners,
        "failures": _failures(progress),
        "seconds": progress.seconds,
    }
