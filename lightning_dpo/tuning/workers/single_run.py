"""One run of the recipe on a group of workers, outside of any trial."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import ray

from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.fit import fit_recipe
from lightning_dpo.tuning.trial.report_callback import reference_passes
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.workers.group import cluster_placement, make_trainer
from lightning_dpo.tuning.workers.strategies import worker_trainer_options

__all__ = ["run_on_workers"]


def run_on_workers(spec: TrialSpec, trainer_options: Mapping[str, Any]) -> None:
    """Run the recipe on a group of workers, on as many machines as there are.

    Args:
        spec: What the sweep's trials have in common; its resources are the group's.
        trainer_options: Take the place of the recipe's trainer arguments.
    """
    trainer = make_trainer(
        spec,
        _fit,
        {"spec": spec, "options": dict(trainer_options)},
        name="prepare",
        retries=spec.retries,
        placement=cluster_placement(spec.resources),
    )
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        try:
            trainer.fit()
        except ray.exceptions.ActorDiedError:
            trainer.fit()  # Ray's controller did not come to life
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)  # which Ray takes, and keeps


def _fit(arguments: dict[str, Any]) -> None:
    spec = arguments["spec"]
    options = {**worker_trainer_options(spec.resources), **arguments["options"]}
    fit_recipe(spec, options, callbacks=[_RecordShare(spec)])


class _RecordShare(pl.Callback):
    """Writes down which machine this worker is on, and how many batches its reference computed."""

    def __init__(self, spec: TrialSpec) -> None:
        self._records = Storage(spec.location) / "preparation"

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        share = {
            "node": ray.get_runtime_context().get_node_id(),
            "batches": reference_passes(pl_module),
        }
        self._records.write(f"worker{trainer.global_rank}.json", json.dumps(share))
