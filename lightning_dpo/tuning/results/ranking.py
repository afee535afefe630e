"""The order of a sweep's trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_dpo.tuning.objective import KL, Goal, Objective
from lightning_dpo.tuning.results.runs import counted_runs, run_mean, runs_by_trial
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["rank"]


def rank(
    trials: Sequence[TrialRecord], objective: Objective, reruns: Sequence[TrialRecord] = ()
) -> tuple[TrialRecord, ...]:
    """Best first, by the first goal in the last report, or in that of the step that was kept.

    Trials that went wrong come last.

    Where values were run with several seeds, the mean of the runs that count is what ranks: first trials that
    were confirmed, then those that were repeated, and then those that were run once. Of the first those come
    last of which a confirming run went wrong: the others' mean is not what their values give.

    Of trials that are equal in it, the one with the better other goals comes first, then that with the lower
    KL: it needed to move less from the reference.
    """
    goals = (*objective.goals, Goal(KL, "min"))
    again = runs_by_trial(reruns)

    def key(trial: TrialRecord) -> tuple[Any, ...]:
        own = again.get(trial.id, ())
        runs = counted_runs(trial, own)
        is_confirmed = runs[0] is not trial
        means = (run_mean(trial, own, goal.metric) for goal in goals)
        values = (None if mean is None else mean.mean for mean in means)
        scores = (
            -goal.score(value) if value is not None else float("inf")
            for goal, value in zip(goals, values, strict=True)
        )
        is_shaky = any(run.status.went_wrong and run.purpose == "confirm" for run in own)
        return (not trial.is_ranked, not is_confirmed, len(runs) < 2, is_shaky, *scores, trial.id)

    return tuple(sorted(trials, key=key))
