"""`parallax-gen replay`: how soon samplers find a sweep's best config, and how slow borrowed configs are."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from parallax_gen.cli.options import json_option
from parallax_gen.cli.text import console, print_json, print_tables, print_text
from parallax_gen.errors import install_command

if TYPE_CHECKING:
    from parallax_gen.bench.plots import SearchCurves

SLOW_SAMPLERS = ("gp",)  # they take minutes per seed, so they run only on request

SEARCH_OPTIONS = {name: f"--{name}" for name in ("seeds", "share", "workers")} | {
    "samplers": "--sampler",
    "folder": "--out",
}


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--borrow", is_flag=True, help="Evaluate the configs that calls would borrow, instead of samplers.")
@click.option("--sampler", "samplers", multiple=True, metavar="NAME", help="Repeatable. Default: all but gp.")
@click.option("--seeds", type=click.IntRange(min=1), default=20, show_default=True, help="Searches per sampler.")
@click.option(
    "--share",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.2,
    show_default=True,
    help="Fraction of a sweep's configs that a search may try.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes. Default: one per core.")
@click.option(
    "--out",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also write regrets.csv to this folder, and regrets.png if matplotlib is installed.",
)
@json_option
@click.pass_context
def replay(
    context: click.Context,
    files: tuple[Path, ...],
    borrow: bool,
    samplers: tuple[str, ...],
    seeds: int,
    share: float,
    workers: int | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Replay searches on recorded sweeps, to compare samplers.

    The tuner's search proposes configs and gets the times recorded in the sweep. Regret is how much longer the best
    config so far takes than the sweep's best. For each sampler the table has the trials until the regret is below 2 %,
    as the median and quartiles over all seeds, then the median regret after some fractions of the configs.

    \b
    Samplers
      ours            like the tuner: the default config, then the default sampler
      model           in the order of the static model, without measurements
      corrected       the model, corrected knob by knob with the times so far
      tpe             Optuna's, like tpe-univariate, cma (needs the package
                      cmaes) and gp (needs scipy)
      random

    With --borrow no search is replayed: the ranking chooses a config for each kernel and bucket with more and more
    records left out, and measured times show how much slower each choice is than the fastest config. FILES contain
    the times: sweeps, or records from `parallax-gen db export`. Without FILES the times come from the shipped records
    and your database.

    \b
    Example
      parallax-gen replay sweeps/*.jsonl.gz --seeds 20 --out replayed
      parallax-gen replay --borrow
    """
    if borrow:
        conflicting = [name for name in SEARCH_OPTIONS if context.get_parameter_source(name) != ParameterSource.DEFAULT]
        if conflicting:
            raise click.UsageError(f"--borrow cannot be combined with {SEARCH_OPTIONS[conflicting[0]]}")
        _evaluate_borrowing(files, as_json)
        return
    if not files:
        raise click.UsageError("name files of sweeps, or use --borrow")
    from parallax_gen.tuning.replay_tables import sampler_table, sweep_to_json
    from parallax_gen.tuning.search.recorded_sweep import STRATEGIES, read_sweep, replay_searches
    from parallax_gen.tuning.search.search import missing_package

    for name in samplers:
        if name not in STRATEGIES:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(STRATEGIES)}", param_hint="--sampler")
    usual = [name for name in STRATEGIES if name not in SLOW_SAMPLERS and missing_package(name) is None]
    replays: SearchCurves = []
    for path in files:
        sweep = read_sweep(path)
        trials = max(1, math.ceil(share * len(sweep.results)))
        with console(stderr=True).status(f"{path.name}: {seeds} seeds, {trials} trials"):
            curves = replay_searches(sweep, samplers or usual, seeds=seeds, trials=trials, workers=workers)
        replays.append((_name(path), sweep, curves))
        if not as_json:
            print_tables([sampler_table(*replays[-1])])
    if folder is not None:
        from parallax_gen.bench.plots import draw_regrets, write_regrets

        folder.mkdir(parents=True, exist_ok=True)
        write_regrets(folder / "regrets.csv", replays)
        if not draw_regrets(folder / "regrets.png", replays):
            click.echo(f"no regrets.png, which needs matplotlib: {install_command('pictures')}", err=True)
    if as_json:
        print_json({"sweeps": [sweep_to_json(*results) for results in replays]})


def _name(path: Path) -> str:
    return path.name.partition(".jsonl")[0]


def _evaluate_borrowing(files: tuple[Path, ...], as_json: bool) -> None:
    """Print the slowdown of borrowed choices, from the measurements in `files`, or without files from the memory."""
    from parallax_gen.memory.descriptions import open_memory
    from parallax_gen.memory.ranking import is_rendered
    from parallax_gen.problem.hardware import GPUS
    from parallax_gen.tuning.borrowing import borrowed, comparable_times, read_results, summarise
    from parallax_gen.tuning.replay_tables import BORROWING_LEGEND, borrowing_tables, choice_to_json

    measurements = [result for path in files for result in read_results(path)]
    records = open_memory().all()
    if not files:
        measurements = [r for r in records if r.place.gpu in GPUS and is_rendered(r, GPUS[r.place.gpu])]
    sets = comparable_times(measurements)
    with console(stderr=True).status(f"{len(sets)} sets of times"):
        choices = [choice for times in sets for choice in borrowed(times, records)]
    summaries = summarise(choices)
    if as_json:
        print_json({"summaries": list(map(asdict, summaries)), "choices": list(map(choice_to_json, choices))})
        return
    print_tables(borrowing_tables(summaries))
    print_text(BORROWING_LEGEND)
    click.echo(f"sets of times: {len(sets)}")
