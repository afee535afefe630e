"""Means over each of several data sets that are validated on together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from lightning_dpo.training.metrics.feedback import FeedbackMeans
from lightning_dpo.training.metrics.weighted_means import WeightedMeans
from lightning_dpo.training.step_output import StepOutput

__all__ = ["DataSetMeans"]


StepMetric: TypeAlias = WeightedMeans | FeedbackMeans
"""A metric of the statistics of steps."""


class DataSetMeans(nn.Module):
    """Means over the examples of each data set that has a name, exact over any number of ranks.

    Attributes:
        data_sets: What the data sets are called, in the order of the batches' `origins`.
        means: One metric for each of them.
    """

    def __init__(self, data_sets: Sequence[str] = (), *, make: Callable[[], StepMetric]) -> None:
        """Prepare empty sums.

        Args:
            data_sets: What the data sets are called; none where there is one without a name.
            make: Makes what sums up one of them, which takes statistics and weights.
        """
        super().__init__()
        self.data_sets = tuple(data_sets)
        self.means = [make() for _ in data_sets]
        self._registered = nn.ModuleList(self.means)  # so that they move with the module

    def update(self, batch: Any, output: StepOutput) -> None:
        """Add a validation step.

        Args:
            batch: It has `origins` and `weights` where data sets have names.
            output: What its step gave.
        """
        if not self.means:
            return
        origins: Tensor = batch.origins
        if len(origins) != len(output.weights):  # the step left fillers out
            origins = origins[batch.weights.nonzero().squeeze(1)]
        origins = origins.to(output.weights.device)
        for number, means in enumerate(self.means):
            means.update(output.statistics, output.weights * (origins == number))

    def compute(self) -> dict[str, Tensor]:
        """Mean of each number of each data set by its logged name; none of one without examples so far."""
        found: dict[str, Tensor] = {}
        for data_set, means in zip(self.data_sets, self.means, strict=True):
            values = means.compute()
            found |= {f"val/{data_set}/{name}": v for name, v in values.items() if not v.isnan()}
        return found

    def reset(self) -> None:
        """Begin anew."""
        for means in self.means:
            means.reset()
