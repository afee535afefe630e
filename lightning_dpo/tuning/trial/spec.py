"""TrialSpec: what every trial of a sweep has to know, sent to all machines once."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_dpo.tuning.cluster.resources import Resources
from lightning_dpo.tuning.objective import JUDGED, KL, Objective
from lightning_dpo.tuning.recipe.recipe import Recipe
from lightning_dpo.tuning.search.space import SearchSpace
from lightning_dpo.tuning.search.stops import StopRules
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.checkpoints import CheckpointPlan, CheckpointStore
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["TrialSpec"]


@dataclass(frozen=True)
class TrialSpec:
    """What all trials of a sweep have in common.

    Attributes:
        recipe: What to train.
        space: How Ray's config becomes overrides.
        objective: Metrics that each report must have.
        location: The sweep's folder.
        cwd: Relative paths of the recipe start here.
        import_path: Where the user's own classes are found.
        resources: What a trial takes of the cluster.
        retries: How often the workers of a trial start again after one of them died.
        kl_prompts: Prompts to sample completions for.
        kl_tokens: Longest of these completions.
        judge: What scores them, as `SweepConfig.judge` names it; None where nothing does.
        judged: Names of the metrics that it gives.
        round: Name of the round of reruns that these trials are; empty for those of the search.
        checkpoint_plan: When a trial keeps more than policy weights.
        stop: What ends a trial that has done enough.
        keeps_best: Keep the weights of each trial's best step, and rank by it; False takes the last one.
        prepared: Overrides that preparation found, such as the shared reference.
    """

    recipe: Recipe
    space: SearchSpace
    objective: Objective
    location: str
    cwd: str
    import_path: tuple[str, ...] = ()
    resources: Resources = field(default_factory=Resources)
    retries: int = 0
    kl_prompts: int = 0
    kl_tokens: int = 64
    judge: str | Mapping[str, Any] | None = None
    judged: tuple[str, ...] = ()
    round: str = ""
    checkpoint_plan: CheckpointPlan = field(default_factory=CheckpointPlan)
    stop: StopRules = field(default_factory=StopRules)
    keeps_best: bool = False
    prepared: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measures_kl(self) -> bool:
        """Whether trials sample completions and log their KL."""
        return bool(self.kl_prompts) and self.recipe.traits.samples_completions

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        """The metrics of the goals, and what is measured of completions."""
        measured = (*(name for name in JUDGED if name in self.judged), KL) if self.measures_kl else ()
        return tuple(dict.fromkeys((*(goal.metric for goal in self.objective.goals), *measured)))

    @property
    def records(self) -> Storage:
        """Folder of what trials write about themselves."""
        return Storage(f"{self.location}/trials")

    @property
    def outcomes(self) -> Storage:
        """Folder of what trials found for each validation pair."""
        return Storage(f"{self.location}/outcomes")

    @property
    def checkpoints(self) -> CheckpointStore:
        """The trials' checkpoints."""
        return CheckpointStore(Storage(f"{self.location}/checkpoints"))

    def new_record(self, trial: str, config: Mapping[str, Any]) -> TrialRecord:
        """The record of a trial that has not begun.

        Args:
            trial: Ray's name for it.
            config: What Ray chose.
        """
        rerun_of, purpose = self.space.origin(config)
        return TrialRecord(trial, self.space.overrides(config), rerun_of=rerun_of, purpose=purpose)

    def record(self, trial: str, config: Mapping[str, Any]) -> TrialRecord:
        """What is known of a trial, with the values that Ray chose for this start of it.

        Args:
            trial: Ray's name for it.
            config: What Ray chose.
        """
        known = TrialRecord.load(self.records, trial) or self.new_record(trial, config)
        return known if known.status.is_over else replace(known, overrides=self.space.overrides(config))

    @contextlib.contextmanager
    def user_environment(self) -> Iterator[None]:
        """Work in the user's directory, where this machine has it, and with the user's import path."""
        before = Path.cwd()
        sys.path.extend(entry for entry in self.import_path if entry not in sys.path)
        if Path(self.cwd).is_dir():
            os.chdir(self.cwd)
        try:
            yield
        finally:
            os.chdir(before)
