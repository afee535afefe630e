"""Optuna's pruners as a scheduler: Ray stops a trial where a pruner says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

if TYPE_CHECKING:
    from lightning_dpo.tuning.search.optuna_study import StudySearch

__all__ = ["PrunerScheduler"]


class PrunerScheduler(FIFOScheduler):
    """Asks the study's pruner at each report. Ray's own OptunaSearch sets its study none."""

    def __init__(self, searcher: StudySearch) -> None:
        """Name the searcher, which holds the study."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop the trial where the pruner would."""
        prunes = self._searcher.prunes(trial.trial_id, result)
        return str(TrialScheduler.STOP if prunes else TrialScheduler.CONTINUE)
