"""A trial's training run in a process of its own, as a sweep's warm process runs it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from sweep_project import settings
from transformers import AutoModelForCausalLM

from lightning_dpo.tuning import SweepConfig
from lightning_dpo.tuning.trial.checkpoints import CheckpointPlan
from lightning_dpo.tuning.trial.ending import Outcome
from lightning_dpo.tuning.trial.fit import fit_trial, local_trainer_options
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.report_callback import Saved
from lightning_dpo.tuning.trial.resume import after_report, begin_from, begun
from lightning_dpo.tuning.trial.spec import TrialSpec

seen: list[weakref.ref[Any]] = []
steps: list[tuple[float, int]] = []
validated: list[tuple[int, dict[str, torch.Tensor], dict[int, float]]] = []
"""Of each validation that `Witness` saw: the step, the policy's weights, each pair's accuracy by its key."""


class Remember(pl.Callback):
    """Keeps a weak reference to the module, and raises at a step."""

    def __init__(self, raise_at: int | None = None) -> None:
        self.raise_at = raise_at

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 0:
            seen.append(weakref.ref(pl_module))
        if trainer.global_step == self.raise_at:
            raise KeyError("a mistake of one's own")


class NoteSteps(pl.Callback):
    """Notes whose step it is, by its beta, and raises in one of the trials."""

    def __init__(self, broken: float) -> None:
        self.broken = broken

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        steps.append((pl_module.loss.beta, trainer.global_step))
        if pl_module.loss.beta == self.broken and trainer.global_step == 3:
            raise KeyError("a mistake of one's own")


class Witness(pl.Callback):
    """Notes the weights of each validation and what it finds, and gives the policy back its first weights."""

    def __init__(self, forget_at: int | None = None) -> None:
        self.forget_at = forget_at
        self.found: dict[int, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if self.forget_at is not None and trainer.global_step >= self.forget_at:
            first = AutoModelForCausalLM.from_pretrained(pl_module.settings.policy)
            pl_module.policy.load_state_dict(first.state_dict())

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        from lightning_dpo.tuning.trial.outcomes import pair_keys

        values = pl_module.latest.statistics["rewards/accuracy"].tolist()
        self.found |= dict(zip(map(int, pair_keys(batch)), values, strict=True))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        validated.append((trainer.global_step, _copied(pl_module), self.found))
        self.found = {}


def _copied(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.policy.state_dict().items()}


class Ended(NamedTuple):
    """What became of a trial, and how many models it left in memory."""

    status: str
    reports: list[dict[str, Any]]
    models: int


def spec_of(
    project: Path,
    location: Path,
    *,
    raise_at: int | None = None,
    callbacks: tuple[Mapping[str, Any], ...] = (),
    overrides: Mapping[str, Any] | None = None,
    **fields: Any,
) -> TrialSpec:
    remember = {"class_path": "trial_jobs.Remember", "init_args": {"raise_at": raise_at}}
    given = {"trainer.callbacks": [remember, *callbacks], **(overrides or {})}
    config = SweepConfig(space={"model.loss.beta": 0.1}, **settings(project, overrides=given))
    spec = TrialSpec(
        config.to_recipe(), config.search_space(), config.goals(), str(location), str(Path.cwd())
    )
    return replace(spec, **fields)


def run_trial(project: Path, location: Path, raise_at: int | None) -> Ended:
    reports: list[dict[str, Any]] = []
    outcome, _ = run_in(spec_of(project, location, raise_at=raise_at), reports=reports)
    return Ended(str(outcome.status), reports, sum(one() is not None for one in seen))


def run_in(
    spec: TrialSpec, record: TrialRecord | None = None, *, reports: list[dict[str, Any]] | None = None
) -> tuple[Outcome, TrialRecord]:
    """Run a trial, or go on with it, as a process of its own would without Ray."""
    known = record or TrialRecord("t", {"model.loss.beta": 0.1})
    with begin_from(spec, known.id) as beginning:
        state = first = begun(spec, known, beginning)

        def report(metrics: dict[str, Any], saved: Saved) -> None:
            nonlocal state
            state = after_report(spec, state, metrics, saved)
            if reports is not None:
                reports.append(metrics)

        outcome = fit_trial(
            spec,
            known.overrides,
            report,
            trial=known.id,
            starts=first.starts,
            kept=first.kept,
            checkpoint=beginning.folder,
            trainer_options=local_trainer_options(spec.resources),
        )
    return outcome, state


EVERY_REPORT = CheckpointPlan(full_state_every=1)


def share(found: Mapping[int, float], *, half: int) -> float:
    """Mean accuracy of the pairs whose keys are even (half 0) or odd (half 1)."""
    return float(np.mean([value for key, value in found.items() if key % 2 == half]))
