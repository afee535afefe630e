"""Trials that Ray gives up although they may be tried again are taken up again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from ray.tune import ResultGrid, Tuner
from ray.tune.experiment import Trial

from lightning_dpo.tuning.cluster.tune_settings import tune_settings

__all__ = ["fit_with_retries", "was_interrupted"]

_ROUNDS = 3

_INTERRUPTED = "_lightning_dpo_interrupted"
"""Attribute of Tune's outcome."""


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
        outcome = _fit(tuner)
        for _ in range(_ROUNDS):
            if not any(_was_given_up(trial) for trial in outcome._experiment_analysis.trials):
                break
            outcome = _fit(restore())
    return outcome


def was_interrupted(outcome: ResultGrid) -> bool:
    """Whether a user ended what `fit_with_retries` ran, by Ctrl-C.

    Args:
        outcome: What it returned.
    """
    return bool(getattr(outcome, _INTERRUPTED, False))


def _fit(tuner: Tuner) -> ResultGrid:
    """Run, and mark the outcome if a signal ended it: Tune then returns as if all trials were over.

    While it runs Tune has a handler of its own for SIGINT. It puts the earlier one back if the signal comes,
    and otherwise leaves its own behind, which would swallow the next Ctrl-C.
    """
    takes_signals = os.environ.get("TUNE_DISABLE_SIGINT_HANDLER", "0") == "0"
    if not takes_signals or threading.current_thread() is not threading.main_thread():
        return tuner.fit()
    before = signal.getsignal(signal.SIGINT)
    try:
        outcome = tuner.fit()
        setattr(outcome, _INTERRUPTED, signal.getsignal(signal.SIGINT) is before)
    finally:
        signal.signal(signal.SIGINT, before)
    return outcome


def _was_given_up(trial: Trial) -> bool:
    """Whether a trial ended in an error with retries left."""
    return trial.status == Trial.ERROR and bool(trial.should_recover())  # type: ignore[no-untyped-call]
