"""Proposes configs one at a time, from the costs of earlier ones. The only module that uses Optuna's samplers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import TrialState, create_trial

from parallax_gen.errors import ArgumentError, install_command
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.space import coerce, every_config, knobs_of
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.search.samplers import CorrectedModelSampler, Guess, ModelSampler, RandomSampler, Sampler

# If Optuna proposes no new valid config in this many attempts, few are left: take any, and halve the attempts for the
# next time.
MAX_FUTILE_ASKS = 40
STARTUP_TRIALS = 16  # random trials before Optuna's samplers use their model


def _tpe(multivariate: bool, seed: int | None) -> BaseSampler:
    return optuna.samplers.TPESampler(
        seed=seed, multivariate=multivariate, constant_liar=True, n_startup_trials=STARTUP_TRIALS
    )


# Optuna's samplers, and whether they take a knob as an ordered index rather than as a category.
_OPTUNA: dict[str, tuple[Callable[[int | None], BaseSampler], bool]] = {
    "tpe": (partial(_tpe, True), False),
    "tpe-univariate": (partial(_tpe, False), False),
    "gp": (lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS), True),
    "cma": (lambda seed: optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=STARTUP_TRIALS), True),
}
_MODEL_SAMPLERS: dict[str, Callable[[Guess], Sampler]] = {"model": ModelSampler, "corrected": CorrectedModelSampler}
SAMPLERS = (*_MODEL_SAMPLERS, *_OPTUNA, "random")
_NEEDS = {"gp": "scipy", "cma": "cmaes"}  # packages that Optuna needs only for these


def missing_package(sampler: str) -> str | None:
    """The missing package that a sampler needs; None if nothing is missing."""
    package = _NEEDS.get(sampler)
    return package if package and find_spec(package) is None else None


class Search:
    """Proposes configs to try, each once: first those in `first`, in order, then those that a sampler chooses.

    Pass known results to `tell` before the first `ask`. A cost is any positive number, less is better; None means a
    failure, from which Optuna's samplers learn nothing.

    sampler  one of SAMPLERS; by default "corrected" if there is a guess, else "tpe"
    guess    predicts a config's cost before it is tried (cost_model.py); "model" and "corrected" need it
    among    the configs to try, by default every valid one

    The default sampler was chosen by `parallax-gen replay tests/data/sweeps/h200*`: three partial sweeps of 136 to 158
    configs, 20 seeds. To come within 2 % of the best, the default config and then "corrected" took 1, 5 and 2 trials,
    and "model" alone 1, 2 and 1. "tpe" took 30 in one sweep and more than a fifth of all configs in two; "random" took
    more than a fifth in all three. The model was fitted to these sweeps among others, so it does better on them than on
    new ones. If the guess is off for one knob, "corrected" learns that and "model" does not.
    """

    def __init__(
        self,
        spec: KernelSpec,
        gpu: Gpu,
        first: Iterable[KernelConfig] = (),
        seed: int | None = None,
        *,
        guess: Guess | None = None,
        sampler: str | None = None,
        among: Iterable[KernelConfig] | None = None,
    ):
        self._first = deque(first)
        self._untried = dict.fromkeys(every_config(spec, gpu) if among is None else among)
        self._sampler = _sampler(sampler or ("corrected" if guess else "tpe"), spec, seed, guess)

    def ask(self) -> KernelConfig | None:
        """A valid config that was neither proposed nor told before; None if none is left."""
        while self._first:
            config = self._first.popleft()
            if config in self._untried:
                del self._untried[config]
                return config
        if not self._untried:
            return None
        config = self._sampler.propose(self._untried.keys()) or next(iter(self._untried))
        del self._untried[config]
        return config

    def tell(self, config: KernelConfig, cost: float | None) -> None:
        """Learn the cost of a config, whether it was proposed or not."""
        self._untried.pop(config, None)
        self._sampler.learn(config, cost)


def _sampler(name: str, spec: KernelSpec, seed: int | None, guess: Guess | None) -> Sampler:
    if name in _MODEL_SAMPLERS:
        if guess is None:
            raise ArgumentError(
                "sampler", f"{name!r} without a guess", "this sampler together with a guess of the configs' costs"
            )
        return _MODEL_SAMPLERS[name](guess)
    if package := missing_package(name):
        raise ArgumentError(
            "sampler",
            f"{name!r} without the package {package}",
            f"this sampler after: {install_command('samplers')}",
        )
    if name in _OPTUNA:
        make, ordered = _OPTUNA[name]
        return _Optuna(spec, make(seed), ordered)
    if name == "random":
        return RandomSampler(seed)
    raise ArgumentError("sampler", repr(name), ", ".join(SAMPLERS))


class _Optuna:
    """One of Optuna's samplers. A proposal that is invalid or was tried before counts as a failure."""

    def __init__(self, spec: KernelSpec, sampler: BaseSampler, ordered: bool):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._spec, self._ordered = spec, ordered
        self._choices = {knob.name: knob.values for knob in knobs_of(spec)}
        self._distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(values) - 1) if ordered else CategoricalDistribution(values)
            for name, values in self._choices.items()
        }
        self._study = optuna.create_study(sampler=sampler)
        self._pending: dict[KernelConfig, optuna.Trial] = {}
        self._worst: float | None = None
        self._max_asks = MAX_FUTILE_ASKS

    def propose(self, untried: Collection[KernelConfig]) -> KernelConfig | None:
        for _ in range(self._max_asks):
            trial = self._study.ask(self._distributions)
            values = {n: self._choices[n][v] if self._ordered else v for n, v in trial.params.items()}
            config = coerce(self._spec, values)
            if config in untried:
                self._pending[config] = trial
                self._max_asks = min(MAX_FUTILE_ASKS, 2 * self._max_asks)
                return config
            # Samplers learn nothing from a failure. Ordered ones would propose the same again, so they get a bad cost.
            bad = self._worst if self._ordered else None
            self._study.tell(trial, bad, state=TrialState.FAIL if bad is None else None)
        self._max_asks = max(1, self._max_asks // 2)
        return None

    def learn(self, config: KernelConfig, cost: float | None) -> None:
        trial = self._pending.pop(config, None)
        if cost is not None:
            self._worst = max(cost, self._worst or cost)
        if trial is not None:
            self._study.tell(trial, cost, state=TrialState.FAIL if cost is None else None)
            return
        params = asdict(config)
        if cost is None or any(value not in self._choices[name] for name, value in params.items()):
            return  # a failure, or a value that is no longer in the space
        if self._ordered:
            params = {name: self._choices[name].index(value) for name, value in params.items()}
        self._study.add_trial(create_trial(params=params, distributions=self._distributions, value=cost))
