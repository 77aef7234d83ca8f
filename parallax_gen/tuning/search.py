"""Proposes configs. The only user of Optuna: asked for a config, told what it cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from parallax_gen.problem.config import KernelConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.space import coerce, every_config, knobs_of, why_invalid
from parallax_gen.problem.spec import KernelSpec

# Asking this often in vain for a config that is new and valid means that few are left: then take any.
FUTILE_ASKS = 40


class Search:
    """Configs to try, each once: first the `first` ones in their order, then what Optuna's TPE proposes.

    What is known already is told with `tell` before the first `ask`. A cost is any positive number, less being
    better; None is a failure, which the sampler learns nothing from.
    """

    def __init__(self, spec: KernelSpec, gpu: Gpu, first: Iterable[KernelConfig] = (), seed: int | None = None):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._spec, self._gpu = spec, gpu
        self._first = deque(first)
        self._choices = {knob.name: knob.values for knob in knobs_of(spec)}
        self._distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(values) for name, values in self._choices.items()
        }
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=16)
        self._study = optuna.create_study(sampler=sampler)
        self._asked: dict[KernelConfig, optuna.Trial | None] = {}

    def ask(self) -> KernelConfig | None:
        """A valid config that was neither asked nor told before; None when there is none left."""
        while self._first:
            config = self._first.popleft()
            if config not in self._asked and why_invalid(self._spec, config, self._gpu) is None:
                self._asked[config] = None
                return config
        for _ in range(FUTILE_ASKS):
            trial = self._study.ask(self._distributions)
            config = coerce(self._spec, trial.params)
            if config not in self._asked and why_invalid(self._spec, config, self._gpu) is None:
                self._asked[config] = trial
                return config
            self._study.tell(trial, state=TrialState.FAIL)
        left = next((c for c in every_config(self._spec, self._gpu) if c not in self._asked), None)
        if left is not None:
            self._asked[left] = None
        return left

    def tell(self, config: KernelConfig, cost: float | None) -> None:
        """What a config cost, asked for or not."""
        trial = self._asked.get(config)
        self._asked[config] = None
        if trial is not None:
            self._study.tell(trial, cost, state=TrialState.FAIL if cost is None else None)
        elif cost is not None and (known := self._known(config, cost)) is not None:
            self._study.add_trial(known)

    def _known(self, config: KernelConfig, cost: float) -> FrozenTrial | None:
        params = asdict(config)
        if any(value not in self._choices[name] for name, value in params.items()):
            return None  # of a space that was larger: nothing the sampler could propose
        return create_trial(params=params, distributions=self._distributions, value=cost)
