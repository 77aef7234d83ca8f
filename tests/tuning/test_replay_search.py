"""Simulated searches on recorded sweeps: regret, and how soon the tuner's search is near the best."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from sweep_samples import CARD, RECORDED, synthetic_results

from parallax_gen.errors import ArgumentError
from parallax_gen.tuning.search.recorded_sweep import TUNER_STRATEGY, read_sweep, regrets, replay_searches, sweep_of

SWEEP = sweep_of(synthetic_results(), CARD)


@pytest.mark.parametrize("strategy", [TUNER_STRATEGY, "model", "corrected", "random"])
def test_regret_is_zero_after_all_trials(strategy: str) -> None:
    result = regrets(SWEEP, strategy, seed=0, trials=1000)
    assert len(result) == len(SWEEP.results)
    assert result == sorted(result, reverse=True)
    assert result[-1] == 0.0
    assert regrets(SWEEP, strategy, seed=0, trials=5) == result[:5]


def test_optunas_samplers_are_replayed() -> None:
    result = [regrets(SWEEP, strategy, seed=0, trials=10) for strategy in ("tpe", "tpe-univariate")]
    assert [len(regret) for regret in result] == [10, 10]
    assert result[0] == regrets(SWEEP, "tpe", seed=0, trials=10)


def test_quartiles_are_over_seeds() -> None:
    (curve,) = replay_searches(SWEEP, ["random"], seeds=5, trials=len(SWEEP.results), workers=1)
    per_seed = [regrets(SWEEP, "random", seed, trials=1000) for seed in range(5)]
    assert curve.median == [sorted(of_trial)[2] for of_trial in zip(*per_seed, strict=True)]
    assert all(a <= b <= c for a, b, c in zip(curve.lower, curve.median, curve.upper, strict=True))
    near = sorted(next(n for n, regret in enumerate(run, 1) if regret <= 0.02) for run in per_seed)
    assert curve.near_after[1] == near[2]


def test_unreached_regret_is_none() -> None:
    """One trial each: some seeds draw a failure, most a config far from the best."""
    (curve,) = replay_searches(SWEEP, ["random"], seeds=20, trials=1, workers=1)
    per_seed = [regrets(SWEEP, "random", seed, trials=1)[0] for seed in range(20)]
    assert math.inf in per_seed
    assert curve.near_after == (None, None, None)
    assert curve.upper == [sorted(per_seed)[15]]


def test_several_processes_give_the_same_results() -> None:
    one, two = (replay_searches(SWEEP, ["corrected", "random"], seeds=2, trials=9, workers=n) for n in (1, 2))
    assert one == two


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(ArgumentError, match="sampler: got 'best'"):
        regrets(SWEEP, "best", seed=0, trials=1)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_ours_is_within_2_percent_of_the_best_in_a_tenth_of_the_trials(path: Path) -> None:
    sweep = read_sweep(path)
    result = regrets(sweep, TUNER_STRATEGY, seed=0, trials=len(sweep.results) // 10)
    assert result[-1] <= 0.02
