"""The token rate of a training run, and the share of its time that it waits for data."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

__all__ = ["Throughput"]

_RATE_EVERY = 10
"""Batches that one token rate is measured over."""

_clock: Callable[[], float] = time.perf_counter


class Throughput(pl.Callback):
    """Logs what a run does with its time, on this rank.

    train/tokens_per_second is tokens that the policy computed, over wall time. train/data_wait is the share
    of the same time, from 0 to 1, that passed between asking the data loader for a batch and having it.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._tokens = 0
        self._waited = 0.0
        self._asked: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Be told when a batch is asked for, and when it is there."""
        loop: Any = trainer.fit_loop.epoch_loop
        # The loop tells its profiler so. From the class, since a second run must not count twice.
        for name, note in (("_on_before_fetch", self._note_asked), ("_on_after_fetch", self._note_given)):
            tell = getattr(type(loop), name, None)
            if tell is not None:
                setattr(loop, name, _both(note, tell.__get__(loop)))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._restart()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the rate and the share over the batches since they were last logged."""
        latest = getattr(pl_module, "latest", None)
        self._tokens += 0 if latest is None else latest.num_tokens
        if batch_idx and (batch_idx + 1) % _RATE_EVERY:
            return
        elapsed = _clock() - self._since
        # Tensors of the CPU: plain numbers would be copied to the device and back.
        if elapsed > 0:
            pl_module.log("train/data_wait", torch.tensor(min(1.0, self._waited / elapsed)), batch_size=1)
        if self._tokens and elapsed > 0:
            rate = torch.tensor(self._tokens / elapsed)
            pl_module.log("train/tokens_per_second", rate, prog_bar=True, batch_size=1)
        self._restart()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave validation out of both."""
        self._restart()

    def _restart(self) -> None:
        self._since, self._tokens, self._waited, self._asked = _clock(), 0, 0.0, None

    def _note_asked(self) -> None:
        self._asked = _clock()

    def _note_given(self) -> None:
        if self._asked is not None:
            self._waited += _clock() - self._asked
        self._asked = None


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call
