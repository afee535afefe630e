"""How far rewards can be trusted: how often they predict preferences, as they say, and their length bias."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["BINS", "Calibration", "RewardCalibration"]

BINS = 5
"""Bins of the predicted probability between 1/2 and 1: ten between 0 and 1, of which each mirrors another."""

_NOTHING = 1e-12
"""Variance, relative to the mean square, that rounding alone makes."""


class Calibration(NamedTuple):
    """What the rewards of many pairs say about themselves.

    Attributes:
        predicted: Mean probability of preference that the rewards of a bin's pairs give, (bins,); the middle
            of the bin where it has no pairs.
        observed: How often the preference is as predicted, (bins,); NaN where a bin has no pairs.
        share: Share of the pairs that fall in each bin, (bins,).
        error: Expected calibration error: mean of |observed - predicted| over pairs, ().
        length_correlation: Pearson's correlation of a completion's reward with its number of tokens, over all
            completions, (); 0 where either does not vary.
    """

    predicted: Tensor
    observed: Tensor
    share: Tensor
    error: Tensor
    length_correlation: Tensor

    def curve(self) -> list[dict[str, float | None]]:
        """The reliability curve for JSON: an entry for each bin, `observed` is None where it has no pairs."""
        columns = zip(self.predicted.tolist(), self.observed.tolist(), self.share.tolist(), strict=True)
        return [
            {"predicted": predicted, "observed": observed if share else None, "share": share}
            for predicted, observed, share in columns
        ]


class RewardCalibration(Metric):
    """Collects rewards of pairs; exact for each pair over any number of ranks and sizes of batches.

    A pair is counted in both orders, since which side is shown first means nothing: with
    p = sigmoid(r(chosen) - r(rejected)), as a predicted p that came true and as a predicted 1 - p that did
    not. The bins below 1/2 then mirror those above, so only these are kept: a pair's confidence
    max(p, 1 - p), and whether the side that has it is the chosen one (1/2 at a tie).
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    bins: Tensor
    moments: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Prepare empty sums.

        Args:
            kwargs: For torchmetrics.
        """
        super().__init__(**kwargs)
        # Apple's GPUs have no float64; elsewhere sums of squares keep the digits that their difference needs.
        self._dtype_of_sums = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("bins", torch.zeros(3, BINS, dtype=self._dtype_of_sums), dist_reduce_fx="sum")
        self.add_state("moments", torch.zeros(6, dtype=self._dtype_of_sums), dist_reduce_fx="sum")

    def update(
        self, chosen: Tensor, rejected: Tensor, *, lengths: tuple[Tensor, Tensor], weights: Tensor
    ) -> None:
        """Add a batch.

        Args:
            chosen: Rewards of the preferred completions, (batch,).
            rejected: Rewards of the others, (batch,).
            lengths: Tokens of the preferred completions and of the others, (batch,) each.
            weights: Weight of each pair, (batch,).
        """
        chosen, rejected, weights = (self._sums_of(values) for values in (chosen, rejected, weights))
        margin = chosen - rejected
        confidence = margin.abs().sigmoid()
        correct = (margin.sign() + 1) / 2
        place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
        columns = torch.stack([weights, weights * confidence, weights * correct])
        # Not in place: after `validate` the sums are inference tensors. Converted: under bf16-true Lightning
        # gives them the model's type, in which pairs would be lost.
        self.bins = self._sums_of(self.bins).index_add(1, place, columns)
        x = torch.cat([chosen, rejected])
        y = torch.cat([self._sums_of(values) for values in lengths])
        products = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y])
        self.moments = self._sums_of(self.moments) + products @ weights.repeat(2)

    def compute(self) -> Calibration:
        """The collected pairs' calibration, float32."""
        weight, confident, correct = self._sums_of(self.bins)
        share = weight / weight.sum()
        middle = 0.5 + (torch.arange(BINS, device=weight.device) + 0.5) / (2 * BINS)
        predicted = torch.where(weight > 0, confident / weight, middle.to(weight))
        observed = correct / weight
        gap = torch.where(weight > 0, observed - predicted, 0.0)
        result = (predicted, observed, share, (share * gap.abs()).sum(), self._correlation())
        return Calibration(*(value.float() for value in result))

    def _correlation(self) -> Tensor:
        count, x, y, xx, yy, xy = self._sums_of(self.moments).unbind()
        spreads = [(count * squares - total**2) / (count * squares) for total, squares in ((x, xx), (y, yy))]
        varies = (spreads[0] > _NOTHING) & (spreads[1] > _NOTHING)
        scale = (spreads[0] * xx * spreads[1] * yy).clamp(min=0).sqrt() * count
        return torch.where(varies, (count * xy - x * y) / scale, 0.0)

    def _sums_of(self, values: Tensor) -> Tensor:
        return values.to(device=self.bins.device, dtype=self._dtype_of_sums)
