"""What a sweep sets of Tune while it runs, where the user's environment does not: what Tune itself writes."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

__all__ = ["tune_settings"]

_LEAST_SECONDS = 2
_TRIALS_A_SECOND = 50
"""Tune writes the state of all trials at once, however few have changed: were that done every so many seconds
whatever their number, a sweep of ten times the trials would spend a hundred times as much on it."""


@contextlib.contextmanager
def tune_settings(trials: int) -> Iterator[None]:
    """Let Tune write little beside the records of trials, which have all that its own files would.

    Its state, which a sweep is resumed from, is written every 2 seconds, and less often from 150 trials on.
    The files of its loggers, which are flushed at each report and copied with each state, are left out:
    `callbacks` names those that are wanted. That they are not there is not warned of, trial by trial.

    Args:
        trials: How many the sweep has.
    """
    wanted = {
        "TUNE_GLOBAL_CHECKPOINT_S": str(max(_LEAST_SECONDS, trials // _TRIALS_A_SECOND)),
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    }
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    log = logging.getLogger("ray.tune.analysis.experiment_analysis")
    level = log.level
    os.environ.update(missing)
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        for name in missing:
            os.environ.pop(name, None)
