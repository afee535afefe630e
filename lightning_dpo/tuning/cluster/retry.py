"""Trials that Ray gives up although they may be tried again are taken up again."""

from __future__ import annotations

from collections.abc import Callable

from ray.tune import ResultGrid, Tuner
from ray.tune.experiment import Trial

from lightning_dpo.tuning.cluster.tune_settings import tune_settings

__all__ = ["fit_with_retries"]

_ROUNDS = 3


def fit_with_retries(tuner: Tuner, restore: Callable[[], Tuner], *, trials: int = 1) -> ResultGrid:
    """Run every trial, with as many retries as Tune's `max_failures` says.

    When a machine goes away, two calls to the process of a trial can fail within the same moment. Tune takes
    the first as the end of the process and starts the trial again, and the second as the failure of a trial
    that has not begun, which it does not retry.

    Args:
        tuner: What to run.
        restore: Makes the tuner that goes on with what the first one left, trials with errors included.
        trials: How many there are.
    """
    with tune_settings(trials):
        outcome = tuner.fit()
        for _ in range(_ROUNDS):
            if not any(_was_given_up(trial) for trial in outcome._experiment_analysis.trials):
                break
            outcome = restore().fit()
    return outcome


def _was_given_up(trial: Trial) -> bool:
    """Whether a trial ended in an error with retries left."""
    return trial.status == Trial.ERROR and bool(trial.should_recover())  # type: ignore[no-untyped-call]
