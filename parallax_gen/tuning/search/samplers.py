"""Samplers without Optuna: random, by the cost model, and by the cost model corrected with measured costs."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import cache
from typing import Protocol

from parallax_gen.ops.base import KernelConfig, Value

# Predicts a config's cost, in the unit of the cost.
Guess = Callable[[KernelConfig], float]

RIDGE_STRENGTH = 3.0  # acts like 3 more observations with error 0, so a single real one gets a weight of a quarter
OPTIMISM = 0.1  # a bonus in log time for a knob value that was never tried: it is expected to be faster than its guess
FAILURE_PENALTY = math.log(4.0)  # the log error of a failed config: as if it were four times slower than its guess
FIT_PASSES = 3  # passes of the fit over all knobs; each starts from the result of the one before


class Sampler(Protocol):
    """Proposes configs and learns what they cost."""

    def propose(self, untried: Collection[KernelConfig]) -> KernelConfig | None:
        """One of `untried`, which is not empty; None if the sampler found nothing new."""

    def learn(self, config: KernelConfig, cost: float | None) -> None:
        """Learn the cost of a config, whether it was proposed or not; None means a failure."""


class RandomSampler:
    """Proposes configs at random."""

    def __init__(self, seed: int | None):
        self._random = random.Random(seed)

    def propose(self, untried: Collection[KernelConfig]) -> KernelConfig:
        return self._random.choice(list(untried))

    def learn(self, config: KernelConfig, cost: float | None) -> None:
        pass


class ModelSampler:
    """Proposes the config with the least predicted cost."""

    def __init__(self, guess: Guess):
        self._guess = cache(guess)

    def propose(self, untried: Collection[KernelConfig]) -> KernelConfig:
        return min(untried, key=self._guess)

    def learn(self, config: KernelConfig, cost: float | None) -> None:
        pass


class CorrectedModelSampler:
    """Proposes the config with the least predicted cost, corrected by the errors so far for each knob value.

    The log errors are fitted as a sum of one term for each knob value: ridge regression on one-hot knobs, solved knob
    by knob (backfitting). Values that were rarely tried get a bonus.
    """

    def __init__(self, guess: Guess):
        self._guess = cache(lambda config: math.log(guess(config)))
        self._knobs = cache(lambda config: tuple(asdict(config).items()))
        self._errors: dict[KernelConfig, float] = {}
        self._failed: set[KernelConfig] = set()
        self._terms: dict[tuple[str, Value], float] = {}
        self._seen: Counter[tuple[str, Value]] = Counter()
        self._fitted = True

    def propose(self, untried: Collection[KernelConfig]) -> KernelConfig:
        if not self._fitted:
            self._fit()
        return min(untried, key=lambda config: self._guess(config) + self._correction(config) - self._optimism(config))

    def learn(self, config: KernelConfig, cost: float | None) -> None:
        if cost is None:
            self._failed.add(config)
        else:
            self._errors[config] = math.log(cost) - self._guess(config)
        self._fitted = False
        self._seen.update(self._knobs(config))

    def _correction(self, config: KernelConfig) -> float:
        return sum(self._terms.get(knob, 0.0) for knob in self._knobs(config))

    def _optimism(self, config: KernelConfig) -> float:
        return sum(OPTIMISM / math.sqrt(1 + self._seen[knob]) for knob in self._knobs(config))

    def _fit(self) -> None:
        mean = sum(self._errors.values()) / max(1, len(self._errors))  # the guess may be off for all configs
        errors = {config: error - mean for config, error in self._errors.items()} | dict.fromkeys(
            self._failed, FAILURE_PENALTY
        )
        residuals = {config: error - self._correction(config) for config, error in errors.items()}
        configs_of: dict[tuple[str, Value], list[KernelConfig]] = defaultdict(list)
        for config in errors:
            for knob in self._knobs(config):
                configs_of[knob].append(config)
        for _ in range(FIT_PASSES):
            for knob, configs in configs_of.items():
                term = self._terms.get(knob, 0.0)
                new_term = (sum(residuals[config] for config in configs) + term * len(configs)) / (
                    len(configs) + RIDGE_STRENGTH
                )
                for config in configs:
                    residuals[config] += term - new_term
                self._terms[knob] = new_term
        self._fitted = True
