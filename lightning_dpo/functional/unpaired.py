"""Losses on the log-ratio r = log pi - log pi_ref of single completions that were judged desirable or not.

Each gives the loss of every example, (batch,). The mean over the batch is left to the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kto_loss", "kto_z0", "unpaired_apo_zero_loss"]


def kto_z0(logratio_sum: Tensor, *, weight_sum: Tensor) -> Tensor:
    """KTO's estimate of the policy's KL to the reference, z0 of https://arxiv.org/abs/2402.01306.

    Args:
        logratio_sum: Weighted sum of r over completions put to prompts that they do not answer, a scalar.
        weight_sum: Sum of their weights, a scalar.

    Returns:
        max(0, mean of r), a scalar without gradient, nats; 0 where there are no such completions.
    """
    return (logratio_sum / weight_sum.where(weight_sum > 0, 1)).clamp(min=0).detach()


def kto_loss(
    logratio: Tensor,
    *,
    labels: Tensor,
    beta: float,
    z0: Tensor | float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation, https://arxiv.org/abs/2402.01306.

    Args:
        logratio: r of the completions, (batch,), nats.
        labels: Whether each is desirable, (batch,) of bool.
        beta: Strength of the KL constraint.
        z0: The log-ratio that counts as neither gain nor loss, a scalar, nats.
        desirable_weight: The paper's lambda_D.
        undesirable_weight: The paper's lambda_U.

    Returns:
        Loss of each example, (batch,).
    """
    # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where sigmoid(x) is close to 1.
    gain = beta * (logratio - z0)
    return torch.where(
        labels, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
    )


def unpaired_apo_zero_loss(
    logratio: Tensor,
    *,
    labels: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Anchored preference optimisation, zero, Eq. 7 of https://arxiv.org/abs/2408.06266, without pairs.

    Its two terms belong to one completion each, so that they need no partner: it is KTO with z0 = 0.

    Args:
        logratio: r of the completions, (batch,), nats.
        labels: Whether each is desirable, (batch,) of bool.
        beta: Strength of the KL constraint.
        desirable_weight: Weight of the desirable completions.
        undesirable_weight: Weight of the others.

    Returns:
        Loss of each example, (batch,).
    """
    return kto_loss(
        logratio,
        labels=labels,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
