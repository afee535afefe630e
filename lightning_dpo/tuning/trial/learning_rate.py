"""The learning rate of a trial that goes on from a checkpoint, which may be another trial's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch

__all__ = ["UseOwnLearningRate"]


class UseOwnLearningRate(pl.Callback):
    """Gives a resumed optimizer the trial's own learning rate: with PBT the checkpoint is another trial's."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scale the rates of optimizer and scheduler to what the trial's own configuration gives."""
        fresh = _optimizers(pl_module.configure_optimizers())
        for optimizer, own in zip(trainer.optimizers, fresh, strict=False):
            for group, wanted in zip(optimizer.param_groups, own.param_groups, strict=False):
                rate = wanted.get("initial_lr", wanted["lr"])
                known = group.get("initial_lr", group["lr"])
                if known and rate != known:
                    group["lr"] *= rate / known
                    group["initial_lr"] = rate
        for entry in trainer.lr_scheduler_configs:
            scheduler = entry.scheduler
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [g.get("initial_lr", g["lr"]) for g in scheduler.optimizer.param_groups]


def _optimizers(result: Any) -> list[torch.optim.Optimizer]:
    """The optimizers among the forms that `configure_optimizers` may return."""
    if isinstance(result, torch.optim.Optimizer):
        return [result]
    if isinstance(result, Mapping):
        return [result["optimizer"]]
    found = result[0] if isinstance(result, tuple) and isinstance(result[0], list) else result or []
    return [entry["optimizer"] if isinstance(entry, Mapping) else entry for entry in found]
