from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sweep_results import ACCURACY, KL, made_up

from lightning_dpo.tuning import Objective
from lightning_dpo.tuning.results.ranking import rank
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.status import TrialStatus


class Walked(tuple[Any, ...]):
    """Counts how often it is walked through."""

    times = 0

    def __iter__(self) -> Iterator[Any]:
        type(self).times += 1
        return super().__iter__()


def test_of_trials_that_are_equal_the_one_with_the_lower_kl_comes_first() -> None:
    trials = [
        TrialRecord(
            name, {}, TrialStatus("finished"), history=({ACCURACY: 0.7, KL: kl, "step": 4},), total_steps=4
        )
        for name, kl in (("a", 9.0), ("b", 3.0), ("c", 5.0))
    ]
    assert [trial.id for trial in rank(trials, Objective.parse(ACCURACY))] == ["b", "c", "a"]


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
