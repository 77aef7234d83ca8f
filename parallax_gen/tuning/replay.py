"""Searches replayed on recorded sweeps, without a GPU: how soon each sampler comes near the best that there is."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from parallax_gen.errors import ArgumentError
from parallax_gen.machine import usable_cpus
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.heuristics import default_config
from parallax_gen.tuning.estimate import guess_us
from parallax_gen.tuning.search import SAMPLERS, Search
from parallax_gen.tuning.sweep import Sweep

OURS = "ours"  # as the tuner has it: the default first, then the default sampler
CONTENDERS = (OURS, *SAMPLERS)
NEAR = 0.02  # of the best's time: what two measurements of one config differ by


@dataclass(frozen=True)
class Curve:
    """How one contender fared on one sweep: after each trial the regret, what its best so far takes longer than the
    sweep's best, as a share of that; of all seeds the median and quartiles. Infinite until a config works.

    near_after  trials until it came within NEAR; of all seeds the quartiles, None where it did not
    """

    contender: str
    median: list[float]
    lower: list[float]
    upper: list[float]
    near_after: tuple[int | None, int | None, int | None]


def curves(
    sweep: Sweep, contenders: Sequence[str], *, seeds: int, trials: int, workers: int | None = None
) -> list[Curve]:
    """Each contender's curve over so many trials.

    Seeds are shared out over processes, by default one a CPU that this one may use.
    """
    runs = [(name, seed) for name in contenders for seed in range(seeds)]
    of_run = partial(_regrets_of, sweep, trials)
    if workers == 1:
        found = list(map(of_run, runs))
    else:
        with ProcessPoolExecutor(workers or usable_cpus(), mp_context=get_context("spawn")) as pool:
            found = list(pool.map(of_run, runs))
    of_name = {name: found[at * seeds : (at + 1) * seeds] for at, name in enumerate(contenders)}
    return [_curve(name, regrets) for name, regrets in of_name.items()]


def regrets(sweep: Sweep, contender: str, seed: int, trials: int) -> list[float]:
    """The regret after each trial of one search, which sees nothing of the sweep but the costs of what it asks for."""
    if contender not in CONTENDERS:
        raise ArgumentError("sampler", repr(contender), ", ".join(CONTENDERS))
    place, shape, costs, best_us = sweep.place, sweep.shape, sweep.costs, sweep.best_us
    gpu = GPUS.get(place.gpu)
    if gpu is None:
        raise ArgumentError("gpu", repr(place.gpu), ", ".join(GPUS))
    search = Search(
        place.spec,
        gpu,
        first=[default_config(place.spec, shape, gpu)] if contender == OURS else [],
        seed=seed,
        guess=lambda config: guess_us(place.spec, config, shape, gpu),
        sampler=None if contender == OURS else contender,
        among=costs,
    )
    found: list[float] = []
    best = float("inf")
    while len(found) < trials and (config := search.ask()) is not None:
        cost = costs[config]
        search.tell(config, cost)
        best = min(best, float("inf") if cost is None else cost)
        found.append(best / best_us - 1)
    return found


def _regrets_of(sweep: Sweep, trials: int, run: tuple[str, int]) -> list[float]:
    contender, seed = run
    return regrets(sweep, contender, seed, trials)


def _curve(name: str, found: Iterable[list[float]]) -> Curve:
    found = list(found)
    quartiles = [_quartiles(of_trial) for of_trial in zip(*found, strict=True)]
    lower, median, upper = ([three[at] for three in quartiles] for at in range(3))
    never = float("inf")
    near = [next((n for n, regret in enumerate(run, start=1) if regret <= NEAR), never) for run in found]
    first, second, third = (None if n == never else round(n) for n in _quartiles(near))
    return Curve(name, median, lower, upper, (first, second, third))


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Each of them one of the values, or halfway between two: infinite ones do not make a NaN."""
    ordered = sorted(values)
    half = len(ordered) // 2
    lower, upper = ordered[: half or 1], ordered[-(half or 1) :]
    return statistics.median_low(lower), statistics.median(ordered), statistics.median_high(upper)
