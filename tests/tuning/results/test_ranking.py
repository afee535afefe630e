from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sweep_results import ACCURACY, made_up

from lightning_dpo.tuning import Objective
from lightning_dpo.tuning.results.ranking import rank
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.trial.record import TrialRecord


class Walked(tuple[Any, ...]):
    """Counts how often it is walked through."""

    times = 0

    def __iter__(self) -> Iterator[Any]:
        type(self).times += 1
        return super().__iter__()


def test_reruns_are_walked_through_once_however_many_trials_there_are() -> None:
    trials = made_up("/x", trials=40, wide=False).trials
    reruns = Walked(
        TrialRecord(f"r{n}", t.overrides, "finished", history=t.history, rerun_of=t.id, purpose="repeat")
        for n, t in enumerate(trials)
    )
    objective = Objective.parse(ACCURACY)
    Walked.times = 0
    ranked = rank(trials, objective, reruns)
    assert Walked.times == 1
    result = SweepResult("/x", objective, ranked, reruns=reruns)
    assert [mean.runs for mean in map(result.mean, ranked) if mean is not None] == [2] * 40
    assert Walked.times == 2
