"""The order of a sweep's trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_dpo.tuning.objective import Goal, Objective
from lightning_dpo.tuning.results.result import KL
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["rank"]


def rank(trials: Sequence[TrialRecord], objective: Objective) -> tuple[TrialRecord, ...]:
    """Best first, by the last report of the first goal; trials that went wrong come last.

    Of trials that are equal in it, the one with the better other goals comes first, then that with the lower
    KL: it needed to move less from the reference.
    """
    goals = (*objective.goals, Goal(KL, "min"))

    def key(trial: TrialRecord) -> tuple[Any, ...]:
        values = (trial.metrics.get(goal.metric) for goal in goals)
        scores = (
            -goal.score(value) if value is not None else float("inf")
            for goal, value in zip(goals, values, strict=True)
        )
        return (not trial.is_ranked, *scores, trial.id)

    return tuple(sorted(trials, key=key))
