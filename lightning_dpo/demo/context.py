"""Surroundings for small training runs: a trainer without notices and files, torch on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_dpo.training.callbacks.quiet import quiet

__all__ = ["quiet", "quiet_trainer", "single_thread"]


def quiet_trainer(
    *, max_epochs: int, gradient_clip_val: float | None = 1.0, progress: bool = False, **options: Any
) -> pl.Trainer:
    """A trainer on one device that writes no files and prints at most a progress bar.

    Args:
        max_epochs: Passes over the data.
        gradient_clip_val: Largest norm of the gradient; None does not clip.
        progress: Show the bar.
        options: Further ones of Lightning's Trainer.
    """
    return pl.Trainer(
        max_epochs=max_epochs,
        devices=1,
        gradient_clip_val=gradient_clip_val,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        **options,
    )


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch on one CPU thread.

    Tensors this small gain little from a second thread, and lose a great deal to waiting for it where other
    work shares the cores. The order of sums, and with it the result, is then the same on any number of cores.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)
