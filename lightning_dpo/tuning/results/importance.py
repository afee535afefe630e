"""How much of the objective's differences between trials each parameter explains."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.status import TrialStatus

__all__ = ["ENOUGH_TRIALS", "Importance", "parameter_importance"]

ENOUGH_TRIALS = 8
"""Finished trials below which nothing is said."""

_BEST_SHARE = 0.5
"""PED-ANOVA compares this share of the trials, the best ones, with all: Optuna's 0.1 is two trials of 16."""


class Importance(NamedTuple):
    """The importance of each parameter.

    Attributes:
        shares: By config path, the largest first; they add up to 1.
        method: "fANOVA", or "PED-ANOVA" where scikit-learn is not installed.
        trials: Finished trials that it is computed from.
        left_out: Config paths that some of these trials did not set.
    """

    shares: Mapping[str, float]
    method: str
    trials: int
    left_out: tuple[str, ...] = ()


def parameter_importance(result: SweepResult) -> Importance | None:
    """How much each parameter matters for the first goal.

    By Optuna's fANOVA (https://proceedings.mlr.press/v32/hutter14.html) where scikit-learn is installed, else
    by its PED-ANOVA (https://arxiv.org/abs/2304.10255).

    Trials that were stopped early do not count: what they reported depends on when they were stopped.

    Args:
        result: A sweep.

    Returns:
        None where fewer than `ENOUGH_TRIALS` finished, fewer than two parameters vary, or the objective does
        not, or Optuna is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        return None
    goal = result.objective.primary
    trials = [
        trial
        for trial in result.trials
        if trial.status is TrialStatus.FINISHED and math.isfinite(trial.metrics.get(goal.metric, math.nan))
    ]
    if len(trials) < ENOUGH_TRIALS or len({trial.metrics[goal.metric] for trial in trials}) < 2:
        return None
    paths = dict.fromkeys(path for trial in trials for path in trial.overrides)
    everywhere = [path for path in paths if all(path in trial.overrides for trial in trials)]
    spread = {path: _distribution([trial.overrides[path] for trial in trials]) for path in everywhere}
    varied = {path: one for path, one in spread.items() if one is not None}
    if len(varied) < 2:
        return None
    shares, method = _shares(trials, varied, metric=goal.metric, mode=goal.mode)
    if not all(math.isfinite(share) for share in shares.values()) or not sum(shares.values()):
        return None
    left_out = tuple(path for path in paths if path not in everywhere)
    return Importance(shares, method, len(trials), left_out)


def _distribution(values: Sequence[Any]) -> Any | None:
    """Optuna's distribution over the values of one path; None where they are all the same."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if len({repr(value) for value in values}) < 2:
        return None
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return CategoricalDistribution(sorted({_category(value) for value in values}))
    low, high = float(min(values)), float(max(values))
    return FloatDistribution(low, high, log=low > 0 and high / low > 8)


def _category(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _shares(
    trials: Sequence[TrialRecord], varied: Mapping[str, Any], *, metric: str, mode: str
) -> tuple[dict[str, float], str]:
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.importance import (
        FanovaImportanceEvaluator,
        PedAnovaImportanceEvaluator,
        get_param_importances,
    )

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
            for trial in trials:
                values = {
                    path: float(trial.overrides[path])
                    if isinstance(one, FloatDistribution)
                    else _category(trial.overrides[path])
                    for path, one in varied.items()
                }
                study.add_trial(
                    optuna.trial.create_trial(
                        value=float(trial.metrics[metric]), params=values, distributions=dict(varied)
                    )
                )
            try:
                evaluator: Any = FanovaImportanceEvaluator(seed=0)
            except ImportError:
                evaluator = PedAnovaImportanceEvaluator(target_quantile=_BEST_SHARE)
            found = get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(before)
    method = "fANOVA" if isinstance(evaluator, FanovaImportanceEvaluator) else "PED-ANOVA"
    return {path: float(share) for path, share in found.items()}, method
