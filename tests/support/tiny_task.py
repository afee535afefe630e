"""The embedded task in seconds: a model that learns a little of the grammar."""

from __future__ import annotations

from lightning_dpo.demo.task import TaskConfig


def tiny_task_config(*, train_pairs: int = 128, validation_pairs: int = 48) -> TaskConfig:
    """Parameters of a task of one narrow layer and few pairs."""
    return TaskConfig(
        hidden_size=32,
        layers=1,
        fit_steps=120,
        fit_batch_size=16,
        fit_lr=2e-2,
        train_pairs=train_pairs,
        validation_pairs=validation_pairs,
    )
