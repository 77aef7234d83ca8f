"""Proposes configs, one after the other: asked for a config, told what it cost. The only user of Optuna."""

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

from parallax_gen.errors import ArgumentError
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.space import coerce, every_config, knobs_of
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.search.samplers import Chance, Corrected, Guess, Order, Sampler

# Asking Optuna this often in vain for a config that is new and valid means that few are left: then take any, and ask
# half as often the next time.
FUTILE_ASKS = 40
STARTUP = 16  # trials by chance before Optuna's samplers trust what they learnt


def _tpe(multivariate: bool, seed: int | None) -> BaseSampler:
    return optuna.samplers.TPESampler(
        seed=seed, multivariate=multivariate, constant_liar=True, n_startup_trials=STARTUP
    )


# Of Optuna's, with what they need: whether they see a knob as a number, its value's place, and not as a name.
_OPTUNA: dict[str, tuple[Callable[[int | None], BaseSampler], bool]] = {
    "tpe": (partial(_tpe, True), False),
    "tpe-univariate": (partial(_tpe, False), False),
    "gp": (lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP), True),
    "cma": (lambda seed: optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=STARTUP), True),
}
_GUESSING: dict[str, Callable[[Guess], Sampler]] = {"model": Order, "corrected": Corrected}
SAMPLERS = (*_GUESSING, *_OPTUNA, "random")
_NEEDS = {"gp": "scipy", "cma": "cmaes"}  # what Optuna does without until it is asked for one of these


def missing_package(sampler: str) -> str | None:
    """The package that a sampler needs and that is not there; None where it has all it needs."""
    package = _NEEDS.get(sampler)
    return package if package and find_spec(package) is None else None


class Search:
    """Configs to try, each once: first the `first` ones in their order, then what a sampler proposes.

    What is known already is told with `tell` before the first `ask`. A cost is any positive number, less being
    better; None is a failure, which Optuna's samplers learn nothing from.

    sampler  one of SAMPLERS; by default "corrected" with a guess, "tpe" without one
    guess    what a config should cost, as well as can be said before it is tried (cost_model.py); "model" and
             "corrected" need it
    among    what there is to be tried, by default every valid config

    The default is by evidence, `parallax-gen replay tests/data/sweeps/h200*`: partial sweeps of 136 to 158 configs, 20
    seeds. To come within 2 % of the best, the default config and then "corrected" took 1, 5 and 2 trials, "model" alone
    1, 2 and 1; "tpe" 30 in one and more than a fifth of all in two, chance in all three. The model's factors were set
    to sweeps of which these are some, so that they flatter it. Where a guess is off by a knob, "corrected" finds out
    and "model" does not.
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
        self._left = dict.fromkeys(every_config(spec, gpu) if among is None else among)
        self._sampler = _sampler(sampler or ("corrected" if guess else "tpe"), spec, seed, guess)

    def ask(self) -> KernelConfig | None:
        """A valid config that was neither asked nor told before; None when there is none left."""
        while self._first:
            config = self._first.popleft()
            if config in self._left:
                del self._left[config]
                return config
        if not self._left:
            return None
        config = self._sampler.propose(self._left.keys()) or next(iter(self._left))
        del self._left[config]
        return config

    def tell(self, config: KernelConfig, cost: float | None) -> None:
        """What a config cost, asked for or not."""
        self._left.pop(config, None)
        self._sampler.learn(config, cost)


def _sampler(name: str, spec: KernelSpec, seed: int | None, guess: Guess | None) -> Sampler:
    if name in _GUESSING:
        if guess is None:
            raise ArgumentError("sampler", f"{name!r} without a guess", "it with a guess of what configs cost")
        return _GUESSING[name](guess)
    if package := missing_package(name):
        raise ArgumentError("sampler", f"{name!r} without the package {package}", f"it after: pip install {package}")
    if name in _OPTUNA:
        make, ordered = _OPTUNA[name]
        return _Optuna(spec, make(seed), ordered)
    if name == "random":
        return Chance(seed)
    raise ArgumentError("sampler", repr(name), ", ".join(SAMPLERS))


class _Optuna:
    """One of Optuna's samplers. What it proposes in vain, known or invalid, counts as a failure."""

    def __init__(self, spec: KernelSpec, sampler: BaseSampler, ordered: bool):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._spec, self._ordered = spec, ordered
        self._choices = {knob.name: knob.values for knob in knobs_of(spec)}
        self._distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(values) - 1) if ordered else CategoricalDistribution(values)
            for name, values in self._choices.items()
        }
        self._study = optuna.create_study(sampler=sampler)
        self._asked: dict[KernelConfig, optuna.Trial] = {}
        self._worst: float | None = None
        self._patience = FUTILE_ASKS

    def propose(self, left: Collection[KernelConfig]) -> KernelConfig | None:
        for _ in range(self._patience):
            trial = self._study.ask(self._distributions)
            values = {n: self._choices[n][v] if self._ordered else v for n, v in trial.params.items()}
            config = coerce(self._spec, values)
            if config in left:
                self._asked[config] = trial
                self._patience = min(FUTILE_ASKS, 2 * self._patience)
                return config
            # A failure teaches nothing: those that would ask for the same again are told that it is bad.
            bad = self._worst if self._ordered else None
            self._study.tell(trial, bad, state=TrialState.FAIL if bad is None else None)
        self._patience = max(1, self._patience // 2)
        return None

    def learn(self, config: KernelConfig, cost: float | None) -> None:
        trial = self._asked.pop(config, None)
        if cost is not None:
            self._worst = max(cost, self._worst or cost)
        if trial is not None:
            self._study.tell(trial, cost, state=TrialState.FAIL if cost is None else None)
            return
        params = asdict(config)
        if cost is None or any(value not in self._choices[name] for name, value in params.items()):
            return  # a failure, or of a space that was larger: nothing the sampler could propose
        if self._ordered:
            params = {name: self._choices[name].index(value) for name, value in params.items()}
        self._study.add_trial(create_trial(params=params, distributions=self._distributions, value=cost))
