"""Training runs small enough for a test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from tiny_models import random_pairs
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_dpo.types import PairBatch, TokenPair


def sgd(params: Any) -> SGD:
    return SGD(params, lr=0.5)


def loader(pairs: Sequence[TokenPair] | None = None, *, batch_size: int = 4, count: int = 16) -> DataLoader:
    rows = random_pairs(count) if pairs is None else list(pairs)
    return DataLoader(rows, batch_size=batch_size, collate_fn=PairBatch.from_pairs)


def trainer(**options: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return pl.Trainer(**{**quiet, **options})


class History(pl.Callback):
    """Every value that was logged in training, by name."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        for name, value in trainer.callback_metrics.items():
            self.values.setdefault(name, []).append(float(value))


@dataclass(slots=True)
class PairsWithMargins(PairBatch):
    """Pairs that say by how much their rewards should differ."""

    margins: Tensor | None = None

    @classmethod
    def of(cls, pairs: Sequence[TokenPair], margins: Sequence[float]) -> PairsWithMargins:
        batch = cls.from_pairs(pairs)
        batch.margins = torch.tensor(margins)
        return batch
