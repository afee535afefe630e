"""What a sweep found: its trials, the best one, and the frontier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lightning_dpo.tuning.objective import JUDGED, KL, Goal, Objective, pareto_front
from lightning_dpo.tuning.results.comparison import Comparison
from lightning_dpo.tuning.results.recommendation import Recommendation, recommend
from lightning_dpo.tuning.results.runs import RunMean, run_mean, runs_by_trial
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["KL", "SweepResult", "TrialRecord"]


@dataclass(frozen=True)
class SweepResult:
    """A sweep that has ended.

    Attributes:
        location: The sweep's folder or URL.
        objective: The goals of the sweep.
        trials: All trials, best first; those that went wrong last.
        reference_passes: Passes of the reference over the data: one if it was shared.
        seconds: Wall time of the sweep.
        settings: The sweep's configuration, as plain values.
        environment: Versions and machines of the sweep.
        recipe: The best trial's complete configuration for `fit`, YAML.
        model: Where the best trial's model is, or None.
        comparisons: How each trial compares with the best one on the same pairs, by its id; trials that went
            wrong, or whose pairs differ, have none.
        reruns: Runs of the trials' values with other seeds.
        recommended_recipe: The recommended trial's complete configuration, where it is not the best one.
        recommended_model: Where its model is then, or None.
        data_fingerprint: Which data it was, see `data_fingerprint`; empty for sweeps of earlier versions.
    """

    location: str
    objective: Objective
    trials: tuple[TrialRecord, ...]
    reference_passes: int = 0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    model: str | None = None
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    reruns: tuple[TrialRecord, ...] = ()
    recommended_recipe: str = ""
    recommended_model: str | None = None
    data_fingerprint: str = ""

    def mean(self, trial: TrialRecord, metric: str | None = None) -> RunMean | None:
        """A metric's mean over the runs that count for a trial, with its error over seeds.

        Args:
            trial: One of `trials`.
            metric: Logged name; the first goal's by default.
        """
        return run_mean(trial, self.runs_again(trial), metric or self.objective.primary.metric)

    def value(self, trial: TrialRecord, metric: str) -> float | None:
        """What a trial is shown with: its own value, or the mean over its runs where it was run again.

        Args:
            trial: One of `trials`.
            metric: Logged name.

        Returns:
            The value; None where it was not measured.
        """
        found = self.mean(trial, metric)
        return None if found is None else found.mean

    def runs_again(self, trial: TrialRecord) -> Sequence[TrialRecord]:
        """The runs of a trial's values with other seeds.

        Args:
            trial: One of `trials`.
        """
        return self._runs_again.get(trial.id, ())

    @property
    def confidence(self) -> float:
        """With which trials were compared."""
        return float(self.settings.get("confidence", 0.95))

    @property
    def recommendation(self) -> Recommendation:
        """Which trial to take, and why."""
        found = {trial.id: self.value(trial, KL) for trial in self.trials if trial.id in self.comparisons}
        kl = {trial: value for trial, value in found.items() if value is not None}
        units = self.objective.units
        return recommend(self.trials, self.comparisons, confidence=self.confidence, kl=kl, units=units)

    @property
    def recommended(self) -> TrialRecord:
        """Of the trials that cannot be told from the best one, the one with the lowest KL."""
        return self.recommendation.trial

    @property
    def best(self) -> TrialRecord:
        """The trial that the first goal ranks first, by its mean where the trial was run again."""
        return self.trials[0]

    @cached_property
    def _runs_again(self) -> Mapping[str, Sequence[TrialRecord]]:
        return runs_by_trial(self.reruns)

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """The config paths that a trial set."""
        return tuple(dict.fromkeys(path for trial in self.trials for path in trial.overrides))

    @cached_property
    def measures_kl(self) -> bool:
        """Whether a trial has a KL."""
        return any(KL in trial.metrics for trial in self.trials)

    @cached_property
    def judged(self) -> tuple[str, ...]:
        """What a judge gave completions of the trials, by metric."""
        return tuple(name for name in JUDGED if any(name in trial.metrics for trial in self.trials))

    @cached_property
    def frontier_goals(self) -> tuple[Goal, ...]:
        """The goals of the frontier: the objective's, and the KL where it was measured."""
        goals = self.objective.goals
        if len(goals) == 1 and self.measures_kl and goals[0].metric != KL:
            return (*goals, Goal(KL, "min"))
        return goals

    @cached_property
    def frontier(self) -> tuple[TrialRecord, ...]:
        """The trials that no other one beats in all goals at once, for example in accuracy and KL.

        Where a trial was run again its means count.
        """
        goals = self.frontier_goals
        found = [(t, [self.value(t, g.metric) for g in goals]) for t in self.trials if t.is_ranked]
        measured = [
            (
                trial,
                [goal.score(value) for goal, value in zip(goals, values, strict=True) if value is not None],
            )
            for trial, values in found
            if None not in values
        ]
        front = pareto_front([scores for _, scores in measured])
        return tuple(measured[index][0] for index in front)

    @property
    def report_path(self) -> str:
        """The report: one HTML file."""
        return f"{self.location}/report.html"
