"""Modules and data of a user's own, named by import path in recipes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dpo import DPOModule, PairBatch


class PromptLengths(pl.LightningModule):
    """Predicts nothing from the pairs of PreferenceDataModule, but trains on each batch."""

    def __init__(self, width: int = 4, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.layer = nn.Linear(1, width)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        return self.layer(torch.full((1, 1), float(len(batch)))).pow(2).mean()

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        self.log("val/pairs", float(len(batch)), batch_size=len(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class BringsData(PromptLengths):
    """Needs no data module."""

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(4, 1))


class Ones(pl.LightningDataModule):
    """Tensors of ones; has no tokenizer."""

    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.rows = rows

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(self.rows, 1))


class ScaledDPO(DPOModule):
    """DPO with one argument more."""

    def __init__(self, *args: Any, factor: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = factor

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.factor
