"""Gradients that are used up do not stay beside the activations of the next step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

__all__ = ["FreeGradients"]


class FreeGradients(pl.Callback):
    """Frees the gradients of the last step before the forward pass of the next one.

    Lightning frees them between forward and backward pass, where activations are at their peak; the step
    computes the same. While batches are accumulated, gradients stay.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask the module to free them, as Lightning does."""
        if pl_module.automatic_optimization and batch_idx % trainer.accumulate_grad_batches == 0:
            for optimizer in trainer.optimizers:
                pl_module.optimizer_zero_grad(trainer.current_epoch, batch_idx, optimizer)
