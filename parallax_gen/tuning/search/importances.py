"""Which knobs decide whether a config is among the fastest, by Optuna's PED-ANOVA."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from parallax_gen.errors import tune_extra
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.space import knobs_of
from parallax_gen.problem.spec import KernelSpec

MIN_TRIALS = 20  # with fewer, a quarter of them is less than the five that Optuna requires
FASTEST, MIN_FASTEST = 0.1, 5  # "among the fastest": a tenth of the trials, at least five


@tune_extra("the importance of knobs")
def importances(spec: KernelSpec, costs: Iterable[tuple[KernelConfig, float]]) -> dict[str, float]:
    """The importance of each knob with more than one value, largest first; they sum to 1. Empty with too few trials.

    costs  comparable costs of one kernel, such as times divided by the best of their bucket. Configs that are no longer
           in the space are left out.

    PED-ANOVA (arXiv:2304.10255) compares the distribution of a knob's values over the fastest trials with that over all
    trials. It sees each knob alone, and says nothing about values that were never tried. Unlike fANOVA it needs no
    scikit-learn, and does not weigh differences between slow and very slow configs.
    """
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import create_trial

    knobs = {knob.name: knob.values for knob in knobs_of(spec) if len(knob.values) > 1}
    choices: dict[str, BaseDistribution] = {name: CategoricalDistribution(values) for name, values in knobs.items()}
    trials = []
    for config, cost in costs:
        values = {name: value for name, value in asdict(config).items() if name in knobs}
        if all(value in knobs[name] for name, value in values.items()):
            trials.append(create_trial(params=values, distributions=choices, value=cost))
    if len(trials) < MIN_TRIALS or len({trial.value for trial in trials}) == 1:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    study.add_trials(trials)
    evaluator = PedAnovaImportanceEvaluator(target_quantile=max(FASTEST, MIN_FASTEST / len(trials)))
    importances = get_param_importances(study, evaluator=evaluator)
    return dict(sorted(importances.items(), key=lambda item: (-item[1], item[0])))
