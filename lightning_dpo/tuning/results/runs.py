"""The runs that count for a trial: its own, and those with other seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["RunMean", "counted_runs", "run_mean", "runs_by_trial"]


class RunMean(NamedTuple):
    """A metric over the runs that count for a trial.

    Attributes:
        mean: Their mean.
        error: Its standard error over seeds; None for a single run.
        runs: How many there are.
    """

    mean: float
    error: float | None
    runs: int


def runs_by_trial(reruns: Iterable[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Runs with other seeds by the id of the trial whose values they have."""
    found: dict[str, list[TrialRecord]] = {}
    for run in reruns:
        found.setdefault(run.rerun_of, []).append(run)
    return found


def counted_runs(trial: TrialRecord, reruns: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The runs of a trial's values.

    Where a trial was confirmed only the runs that confirmed it count: it was chosen for what the earlier ones
    gave, which is too high on average.

    Args:
        trial: A trial of the search.
        reruns: Runs with other seeds, its own at least.
    """
    own = [run for run in reruns if run.is_complete and run.rerun_of == trial.id]
    confirming = [run for run in own if run.purpose == "confirm"]
    return confirming or [trial, *own]


def run_mean(trial: TrialRecord, reruns: Sequence[TrialRecord], metric: str) -> RunMean | None:
    """A metric's mean over the runs that count for a trial; None where it was not measured, or is no number.

    Args:
        trial: A trial of the search.
        reruns: Runs with other seeds, its own at least.
        metric: Logged name.
    """
    values = [float(run.metrics[metric]) for run in counted_runs(trial, reruns) if metric in run.metrics]
    if not values or not all(map(math.isfinite, values)):
        return None
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return RunMean(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return RunMean(mean, math.sqrt(variance / len(values)), len(values))
