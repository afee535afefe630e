"""The token rate of a training run."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch

__all__ = ["Throughput"]

_RATE_EVERY = 10
"""Batches that one token rate is measured over."""


class Throughput(pl.Callback):
    """Logs train/tokens_per_second: tokens that the policy computed, over wall time, on this rank."""

    def __init__(self) -> None:
        self._since = 0.0
        self._tokens = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._since, self._tokens = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the rate over the batches since it was last logged."""
        latest = getattr(pl_module, "latest", None)
        self._tokens += 0 if latest is None else latest.num_tokens
        if self._tokens == 0 or (batch_idx and (batch_idx + 1) % _RATE_EVERY):
            return
        elapsed = time.perf_counter() - self._since
        rate = torch.tensor(self._tokens / elapsed)  # a plain number would be copied to the device and back
        pl_module.log("train/tokens_per_second", rate, prog_bar=True, batch_size=1)
        self._since, self._tokens = time.perf_counter(), 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave validation out of the rate."""
        self._since, self._tokens = time.perf_counter(), 0
