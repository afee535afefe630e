"""A trial's training run in a process of its own, as a sweep's warm process runs it."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from sweep_project import settings

from lightning_dpo.tuning import SweepConfig
from lightning_dpo.tuning.trial.fit import fit_trial, local_trainer_options
from lightning_dpo.tuning.trial.spec import TrialSpec

seen: list[weakref.ref[Any]] = []


class Remember(pl.Callback):
    """Keeps a weak reference to the module, and raises at a step."""

    def __init__(self, raise_at: int | None = None) -> None:
        self.raise_at = raise_at

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 0:
            seen.append(weakref.ref(pl_module))
        if trainer.global_step == self.raise_at:
            raise KeyError("a mistake of one's own")


class Ended(NamedTuple):
    """What became of a trial, and how many models it left in memory."""

    status: str
    reports: list[dict[str, Any]]
    models: int


def spec_of(project: Path, location: Path, *, raise_at: int | None = None) -> TrialSpec:
    remember = {"class_path": "trial_jobs.Remember", "init_args": {"raise_at": raise_at}}
    config = SweepConfig(
        space={"model.loss.beta": 0.1}, **settings(project, overrides={"trainer.callbacks": [remember]})
    )
    return TrialSpec(
        config.to_recipe(), config.search_space(), config.goals(), str(location), str(Path.cwd())
    )


def run_trial(project: Path, location: Path, raise_at: int | None) -> Ended:
    spec = spec_of(project, location, raise_at=raise_at)
    reports: list[dict[str, Any]] = []
    outcome = fit_trial(
        spec,
        {"model.loss.beta": 0.1},
        lambda metrics, folder: reports.append(metrics),
        trial="t",
        trainer_options=local_trainer_options(spec.resources),
    )
    return Ended(str(outcome.status), reports, sum(one() is not None for one in seen))
