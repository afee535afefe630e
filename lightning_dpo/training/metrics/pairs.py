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
        chosen_reward: The chosen completion's reward, in the units of the loss (`PreferenceLoss.rewards`).
        rejected_reward: The rejected completion's reward.
        margin: Difference of the two rewards.
        accuracy: 1 where the chosen reward is larger, 0 where it is smaller, 1/2 at a tie (as at the start,
            where both are 0).
        chosen_logps: log pi of the chosen completion, nats.
        rejected_logps: log pi of the rejected completion, nats.
        logratio_margin: Difference of the two log-ratios log pi - log pi_ref of whole completions, nats:
            comparable between runs of different loss and beta.
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
    losses: Tensor, policy: PairLogps, reference: PairLogps | None, *, rewards: tuple[Tensor, Tensor]
) -> PairStatistics:
    """Statistics of a scored batch.

    Args:
        losses: Loss of each pair, (batch,).
        policy: The policy's log-probabilities.
        reference: The reference's; without one the log-probabilities themselves stand in for log-ratios.
        rewards: Rewards of the chosen and of the rejected completions, (batch,) each, as the loss gives them.
    """
    policy = policy.detach()
    chosen_reward, rejected_reward = (reward.detach() for reward in rewards)
    margin = chosen_reward - rejected_reward
    chosen = policy.chosen if reference is None else policy.chosen - reference.chosen
    rejected = policy.rejected if reference is None else policy.rejected - reference.rejected
    return PairStatistics(
        loss=losses.detach(),
        chosen_reward=chosen_reward,
        rejected_reward=rejected_reward,
        margin=margin,
        accuracy=(margin.sign() + 1) / 2,
        chosen_logps=policy.chosen,
        rejected_logps=policy.rejected,
        logratio_margin=chosen - rejected,
    )
