"""Trials that Ray gives up although they may be tried again are taken up again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from ray.tune import ResultGrid, Tuner
from ray.tune.experiment import Trial

__all__ = ["fit_with_retries"]

_ROUNDS = 3


def fit_with_retries(tuner: Tuner, restore: Callable[[], Tuner]) -> ResultGrid:
    """Run every trial, with as many retries as Tune's `max_failures` says.

    When a machine goes away, two calls to the process of a trial can fail within the same moment. Tune takes
    the first as the end of the process and starts the trial again, and the second as the failure of a trial
    that has not begun, which it does not retry.

    Args:
        tuner: What to run.
        restore: Makes the tuner that goes on with what the first one left, trials with errors included.
    """
    with _without_tables():
        outcome = tuner.fit()
        for _ in range(_ROUNDS):
            if not any(_was_given_up(trial) for trial in outcome._experiment_analysis.trials):
                break
            outcome = restore().fit()
    return outcome


@contextlib.contextmanager
def _without_tables() -> Iterator[None]:
    """Let Tune not warn, with a line for each trial, that its own loggers have left no tables."""
    log = logging.getLogger("ray.tune.analysis.experiment_analysis")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _was_given_up(trial: Trial) -> bool:
    """Whether a trial ended in an error with retries left."""
    return trial.status == Trial.ERROR and bool(trial.should_recover())  # type: ignore[no-untyped-call]
