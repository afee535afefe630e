"""Losses that ask each pair for a margin of its own: by how long its completions are, or how far apart."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_dpo import functional
from lightning_dpo.functional.scores import Divergence
from lightning_dpo.losses.checks import check_non_negative
from lightning_dpo.losses.margin import MarginLoss
from lightning_dpo.types import PairLogps

__all__ = ["ODPOLoss", "OffsetScale", "RDPOLoss"]

OffsetScale: TypeAlias = Literal["log", "linear"]
"""How a pair's margin becomes its offset."""


class RDPOLoss(MarginLoss):
    """Length-regularised DPO, R-DPO, https://arxiv.org/abs/2403.19159.

    -log sigmoid(beta Delta + length_penalty (|chosen| - |rejected|)), for the constrained objective in which
    each token costs `length_penalty` of reward: a preference for the longer completion is put down to its
    length first. The rewards are those of DPO, without the tokens' cost.

    Args:
        beta: Strength of the KL constraint, greater than 0.
        length_penalty: The paper's alpha, at least 0 (plain DPO): reward that a token costs.
        divergence: Constraint in place of the reverse KL, see `MarginLoss`.
        alpha: Parameter of "alpha_divergence".
        max_reward: Bound of chi-PO, see `MarginLoss`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        beta: float = 0.1,
        *,
        length_penalty: float = 0.01,
        divergence: Divergence = "reverse_kl",
        alpha: float = 0.5,
        max_reward: float | None = None,
    ) -> None:
        super().__init__(beta, divergence=divergence, alpha=alpha, max_reward=max_reward)
        self.length_penalty = check_non_negative(
            "length_penalty", length_penalty, hint="0 is plain DPO, usual values are 0.005 to 0.1 a token"
        )

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,)."""
        delta = self.margin(policy, reference)
        return functional.rdpo_loss(
            delta,
            length_difference=policy.chosen_lengths - policy.rejected_lengths,
            beta=self.beta,
            length_penalty=self.length_penalty,
        )

    def expected_at_start(self) -> float | None:
        """The loss of every pair at the start: ln 2 without a penalty; else it depends on the lengths."""
        return None if self.length_penalty else math.log(2)


class ODPOLoss(MarginLoss):
    """DPO with an offset, ODPO, https://arxiv.org/abs/2402.10571.

    -log sigmoid(beta Delta - offset), where the offset grows with the pair's margin, by which the chosen
    completion's score is above the rejected one's (`PairBatch.margins`, the data's column `margin`). On the
    paper's logarithmic scale a margin of 0 takes the pair out: nothing is asked of it. The rewards are those
    of DPO, without the offset.

    Args:
        beta: Strength of the KL constraint, greater than 0.
        offset_weight: The paper's alpha, at least 0 (plain DPO).
        offset_scale: "log" for an offset of `offset_weight` times the margin's logarithm, "linear" for one of
            `offset_weight` times the margin.
        divergence: Constraint in place of the reverse KL, see `MarginLoss`.
        alpha: Parameter of "alpha_divergence".
        max_reward: Bound of chi-PO, see `MarginLoss`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    needs_margins = True

    def __init__(
        self,
        beta: float = 0.1,
        *,
        offset_weight: float = 1.0,
        offset_scale: OffsetScale = "log",
        divergence: Divergence = "reverse_kl",
        alpha: float = 0.5,
        max_reward: float | None = None,
    ) -> None:
        super().__init__(beta, divergence=divergence, alpha=alpha, max_reward=max_reward)
        self.offset_weight = check_non_negative(
            "offset_weight", offset_weight, hint="0 is plain DPO, usual values are 0.1 to 1"
        )
        if offset_scale not in get_args(OffsetScale):
            raise ValueError(f"`offset_scale` must be one of {get_args(OffsetScale)}, got {offset_scale=}")
        self.offset_scale: OffsetScale = offset_scale

    def offset(self, margins: Tensor) -> Tensor:
        """The offset of each pair, (batch,), in units of its rewards.

        Args:
            margins: The margin of each pair, (batch,), at least 0.
        """
        if self.offset_scale == "linear":
            return self.offset_weight * margins
        # 0 where the weight is 0, also at a margin of 0, where a product would be NaN.
        offsets: Tensor = torch.special.xlogy(self.offset_weight, margins)
        return offsets

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,).

        Raises:
            ValueError: If the pairs have no margins.
        """
        if policy.margins is None:
            raise ValueError(
                "`policy` must hold `margins` for ODPOLoss, got None; give the rows a column `margin`, by "
                "how much the chosen completion's score is above the rejected one's, or choose DPOLoss"
            )
        delta = self.margin(policy, reference)
        return functional.odpo_loss(delta, offset=self.offset(policy.margins.to(delta.dtype)), beta=self.beta)

    def expected_at_start(self) -> float | None:
        """The loss of every pair at the start: ln 2 without an offset; else it depends on the margins."""
        return None if self.offset_weight else math.log(2)
