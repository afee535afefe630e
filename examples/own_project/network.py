"""A Lightning project that knows nothing of preferences: a small network fitted to a curve."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class CurveModule(pl.LightningModule):
    """Fits y = sin(3 x) with one hidden layer."""

    def __init__(self, hidden: int = 16, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr
        self.network = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Squared error."""
        x, y = batch
        return nn.functional.mse_loss(self.network(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the squared error."""
        x, y = batch
        self.log("val/error", nn.functional.mse_loss(self.network(x), y))

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class CurveData(pl.LightningDataModule):
    """Points of the curve."""

    def __init__(self, points: int = 256, batch_size: int = 32) -> None:
        super().__init__()
        self.points = points
        self.batch_size = batch_size

    def setup(self, stage: str | None = None) -> None:
        """Draw the points."""
        x = torch.linspace(-1, 1, self.points).unsqueeze(1)
        self.rows = TensorDataset(x, torch.sin(3 * x))

    def train_dataloader(self) -> DataLoader[Any]:
        """In random order."""
        return DataLoader(self.rows, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return DataLoader(self.rows, batch_size=self.batch_size)
