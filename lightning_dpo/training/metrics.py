"""What is logged about preferences: rewards, accuracy, margins; exact per pair over any number of ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dpo.types import PairLogps

__all__ = ["METRIC_NAMES", "PairStatistics", "pair_statistics"]


class PairStatistics(NamedTuple):
    """Numbers of each pair, (batch,) each, without gradient.

    Attributes:
        loss: The preference loss.
        chosen_reward: beta * (log pi - log pi_ref) of the chosen completion.
        rejected_reward: The same of the rejected one.
        margin: Difference of the two rewards.
        accuracy: 1 where the chosen reward is larger, 0 where it is smaller, 1/2 at a tie (as at the start,
            where both are 0).
        chosen_logps: log pi of the chosen completion, nats.
        rejected_logps: The same of the rejected one.
        logratio_margin: The margin without beta, nats: comparable between runs of different beta.
    """

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    margin: Tensor
    accuracy: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    logratio_margin: Tensor


METRIC_NAMES = dict(
    zip(
        PairStatistics._fields,
        (
            "loss",
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margin",
            "rewards/accuracy",
            "logps/chosen",
            "logps/rejected",
            "logratio/margin",
        ),
        strict=True,
    )
)
"""Under which name each statistic is logged, after "train/" or "val/"."""


@torch.no_grad()
def pair_statistics(
    losses: Tensor, policy: PairLogps, reference: PairLogps | None, *, beta: float
) -> PairStatistics:
    """Statistics of a scored batch.

    Args:
        losses: Loss of each pair, (batch,).
        policy: The policy's log-probabilities.
        reference: The reference's; without one the log-probabilities themselves stand in for log-ratios.
        beta: Factor of the rewards.
    """
    policy = policy.detach()
    chosen = policy.chosen if reference is None else policy.chosen - reference.chosen
    rejected = policy.rejected if reference is None else policy.rejected - reference.rejected
    difference = chosen - rejected
    return PairStatistics(
        loss=losses.detach(),
        chosen_reward=beta * chosen,
        rejected_reward=beta * rejected,
        margin=beta * difference,
        accuracy=(difference.sign() + 1) / 2,
        chosen_logps=policy.chosen,
        rejected_logps=policy.rejected,
        logratio_margin=difference,
    )
