"""Who proposes the next config, of those that need no Optuna: by chance, by a guess, by a guess that is put right."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import cache
from typing import Protocol

from parallax_gen.ops.base import KernelConfig, Value

# What a config should cost, in the unit of its cost.
Guess = Callable[[KernelConfig], float]

SHRINK = 3.0  # as many observations of no error: what is seen once is believed to a quarter
HOPE = 0.1  # a value that was not seen is hoped to be so much faster than it is guessed to be
FAILED = math.log(4.0)  # a config that fails counts as so much slower than it was guessed to be, as may those like it
SWEEPS = 3  # of the fit over all knobs; each follows the others' last


class Sampler(Protocol):
    """Proposes configs and learns what they cost."""

    def propose(self, left: Collection[KernelConfig]) -> KernelConfig | None:
        """One of `left`, of which there is one at the least; None where it has nothing new."""

    def learn(self, config: KernelConfig, cost: float | None) -> None:
        """What a config cost, proposed or not; None is a failure."""


class Chance:
    """Any that is left."""

    def __init__(self, seed: int | None):
        self._random = random.Random(seed)

    def propose(self, left: Collection[KernelConfig]) -> KernelConfig:
        return self._random.choice(list(left))

    def learn(self, config: KernelConfig, cost: float | None) -> None:
        pass


class Order:
    """The one that should cost least."""

    def __init__(self, guess: Guess):
        self._guess = cache(guess)

    def propose(self, left: Collection[KernelConfig]) -> KernelConfig:
        return min(left, key=self._guess)

    def learn(self, config: KernelConfig, cost: float | None) -> None:
        pass


class Corrected:
    """The one that should cost least, by the guess times what each knob's value has been off by so far.

    The errors' logarithms are fitted as a sum of one term a value of each knob: ridge regression on knobs as one-hots,
    solved knob by knob (backfitting). Values that were seldom seen are given the benefit of the doubt.
    """

    def __init__(self, guess: Guess):
        self._guess = cache(lambda config: math.log(guess(config)))
        self._knobs = cache(lambda config: tuple(asdict(config).items()))
        self._errors: dict[KernelConfig, float] = {}
        self._failed: set[KernelConfig] = set()
        self._terms: dict[tuple[str, Value], float] = {}
        self._seen: Counter[tuple[str, Value]] = Counter()
        self._fitted = True

    def propose(self, left: Collection[KernelConfig]) -> KernelConfig:
        if not self._fitted:
            self._fit()
        return min(left, key=lambda config: self._guess(config) + self._correction(config) - self._hope(config))

    def learn(self, config: KernelConfig, cost: float | None) -> None:
        if cost is None:
            self._failed.add(config)
        else:
            self._errors[config] = math.log(cost) - self._guess(config)
        self._fitted = False
        self._seen.update(self._knobs(config))

    def _correction(self, config: KernelConfig) -> float:
        return sum(self._terms.get(knob, 0.0) for knob in self._knobs(config))

    def _hope(self, config: KernelConfig) -> float:
        return sum(HOPE / math.sqrt(1 + self._seen[knob]) for knob in self._knobs(config))

    def _fit(self) -> None:
        mean = sum(self._errors.values()) / max(1, len(self._errors))  # the guess may be off for all
        off = {config: error - mean for config, error in self._errors.items()} | dict.fromkeys(self._failed, FAILED)
        left = {config: error - self._correction(config) for config, error in off.items()}
        having: dict[tuple[str, Value], list[KernelConfig]] = defaultdict(list)
        for config in off:
            for knob in self._knobs(config):
                having[knob].append(config)
        for _ in range(SWEEPS):
            for knob, configs in having.items():
                term = self._terms.get(knob, 0.0)
                better = (sum(left[config] for config in configs) + term * len(configs)) / (len(configs) + SHRINK)
                for config in configs:
                    left[config] += term - better
                self._terms[knob] = better
        self._fitted = True
