"""What a sweep found: its trials, the best one, and the frontier."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_dpo.tuning.objective import Goal, Objective, pareto_front
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["KL", "SweepResult", "TrialRecord"]

KL = "val/kl"
"""The KL between policy and reference, which is shown beside the goals wherever it was measured."""


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

    @property
    def best(self) -> TrialRecord:
        """The trial with the best last report of the first goal."""
        return self.trials[0]

    @property
    def frontier_goals(self) -> tuple[Goal, ...]:
        """The goals of the frontier: the objective's, and the KL where it was measured."""
        goals = self.objective.goals
        measured = any(KL in trial.metrics for trial in self.trials)
        if len(goals) == 1 and measured and goals[0].metric != KL:
            return (*goals, Goal(KL, "min"))
        return goals

    @property
    def frontier(self) -> tuple[TrialRecord, ...]:
        """The trials that no other one beats in all goals at once, for example in accuracy and KL."""
        goals = self.frontier_goals
        ranked = [t for t in self.trials if t.is_ranked and all(g.metric in t.metrics for g in goals)]
        points = [[g.score(t.metrics[g.metric]) for g in goals] for t in ranked]
        return tuple(ranked[index] for index in pareto_front(points))

    @property
    def report_path(self) -> str:
        """The report: one HTML file."""
        return f"{self.location}/report.html"
