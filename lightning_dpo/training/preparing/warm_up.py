"""How many steps a learning rate is scheduled for, where the trainer says how long a run is, or does not."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

__all__ = ["scheduled_steps"]


def scheduled_steps(trainer: pl.Trainer) -> int:
    """Optimizer steps of a run; those of one epoch where it is ended by time or by hand, 0 for a stream's.

    Args:
        trainer: The run's.

    Raises:
        ValueError: If neither the run nor an epoch has an end that is known.
    """
    steps = trainer.estimated_stepping_batches
    if steps < 0:  # epochs of a stream
        rank_zero_warn("the data have no length, so that there is no warm-up; set `max_steps` to have one")
        return 0
    if math.isfinite(steps):
        return int(steps)
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if not math.isfinite(batches):
        raise ValueError(
            "`max_steps` or `max_epochs` must say how long the run is, since the warm-up takes a share of "
            "its steps and the data have no length; got neither. Set one of them, or `warmup_ratio=0`, or an "
            "`lr_scheduler` of your own"
        )
    epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    rank_zero_info(
        f"the run's number of steps is not known: the warm-up takes its share of one epoch's, {epoch} steps"
    )
    return epoch
