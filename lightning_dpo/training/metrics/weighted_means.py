"""Means over a whole validation set, exact for each example over any number of ranks and sizes of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["WeightedMeans"]


class WeightedMeans(Metric):
    """Weighted means of named numbers: sums are kept, so no batch size or rank count shifts them."""

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    totals: Tensor
    weight: Tensor

    def __init__(self, names: Sequence[str], *, prefix: str = "", **kwargs: Any) -> None:
        """Prepare empty sums.

        Args:
            names: Of the numbers.
            prefix: Put before each name, as "val/".
            kwargs: For torchmetrics.
        """
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.prefix = prefix
        # Apple's GPUs have no float64; elsewhere a million examples add up without losing a digit.
        self._dtype_of_sums = torch.float32 if torch.backends.mps.is_available() else torch.float64
        zeros = torch.zeros(len(self.names), dtype=self._dtype_of_sums)
        self.add_state("totals", zeros, dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=self._dtype_of_sums), dist_reduce_fx="sum")

    def update(self, statistics: Mapping[str, Tensor], weights: Tensor) -> None:
        """Add a batch.

        Args:
            statistics: Numbers of each example by name, (batch,) each.
            weights: Weight of each example, (batch,).
        """
        weights = self._sums_of(weights)
        values = torch.stack([self._sums_of(statistics[name]) for name in self.names])
        # Not in place: after `validate` the sums are inference tensors. Converted: under bf16-true Lightning
        # gives them the model's type, in which 256 + 1 is 256.
        self.totals = self._sums_of(self.totals) + values @ weights
        self.weight = self._sums_of(self.weight) + weights.sum()

    def compute(self) -> dict[str, Tensor]:
        """Mean of each number by its logged name, float32."""
        means = (self.totals / self.weight).float()
        return {f"{self.prefix}{name}": mean for name, mean in zip(self.names, means, strict=True)}

    def _sums_of(self, values: Tensor) -> Tensor:
        return values.to(device=self.totals.device, dtype=self._dtype_of_sums)
