"""Losses on the two completions' log-ratios r = log pi - log pi_ref, each for itself or across the batch.

Each gives the loss of every pair, (batch,). The mean over the batch is left to the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["aot_margin", "apo_down_loss", "apo_zero_loss", "bco_loss", "nca_loss", "sppo_loss"]


def nca_loss(chosen_logratio: Tensor, *, rejected_logratio: Tensor, beta: float) -> Tensor:
    """Noise contrastive alignment for pairs, https://arxiv.org/abs/2402.05369.

    Args:
        chosen_logratio: r of the chosen completions, (batch,), nats.
        rejected_logratio: r of the rejected completions, (batch,), nats.
        beta: Strength of the KL constraint.

    Returns:
        Loss of each pair, (batch,).
    """
    chosen, rejected = beta * chosen_logratio, beta * rejected_logratio
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


def bco_loss(
    chosen_logratio: Tensor, *, rejected_logratio: Tensor, beta: float, shift: Tensor | float = 0.0
) -> Tensor:
    """Binary classifier optimisation, https://arxiv.org/abs/2404.04656.

    Args:
        chosen_logratio: r of the chosen completions, (batch,), nats.
        rejected_logratio: r of the rejected completions, (batch,), nats.
        beta: Strength of the KL constraint.
        shift: The paper's delta, the reward that divides thumbs up from thumbs down.

    Returns:
        Loss of each pair, (batch,).
    """
    return -logsigmoid(beta * chosen_logratio - shift) - logsigmoid(shift - beta * rejected_logratio)


def sppo_loss(chosen_logratio: Tensor, *, rejected_logratio: Tensor, beta: float) -> Tensor:
    """Self-play preference optimisation with hard labels, https://arxiv.org/abs/2405.00675.

    Eq. 4.7 with the winner's probability 1 and the loser's 0, and its eta = 1 / beta: each log-ratio is
    regressed to plus or minus 1 / (2 beta).

    Args:
        chosen_logratio: r of the chosen completions, (batch,), nats.
        rejected_logratio: r of the rejected completions, (batch,), nats.
        beta: Strength of the KL constraint.

    Returns:
        Loss of each pair, (batch,).
    """
    target = 1 / (2 * beta)
    return (chosen_logratio - target) ** 2 + (rejected_logratio + target) ** 2


def apo_zero_loss(chosen_logratio: Tensor, *, rejected_logratio: Tensor, beta: float) -> Tensor:
    """Anchored preference optimisation, zero, Eq. 7 of https://arxiv.org/abs/2408.06266.

    Args:
        chosen_logratio: r of the chosen completions, (batch,), nats.
        rejected_logratio: r of the rejected completions, (batch,), nats.
        beta: Strength of the KL constraint.

    Returns:
        Loss of each pair, (batch,).
    """
    # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where sigmoid(x) is close to 1.
    return torch.sigmoid(-beta * chosen_logratio) + torch.sigmoid(beta * rejected_logratio)


def apo_down_loss(chosen_logratio: Tensor, *, rejected_logratio: Tensor, beta: float) -> Tensor:
    """Anchored preference optimisation, down, Eq. 8 of https://arxiv.org/abs/2408.06266.

    Args:
        chosen_logratio: r of the chosen completions, (batch,), nats.
        rejected_logratio: r of the rejected completions, (batch,), nats.
        beta: Strength of the KL constraint.

    Returns:
        Loss of each pair, (batch,).
    """
    margin = chosen_logratio - rejected_logratio
    return torch.sigmoid(beta * chosen_logratio) + torch.sigmoid(-beta * margin)


def aot_margin(first: Tensor, *, second: Tensor) -> Tensor:
    """Margins between equal quantiles of two samples, https://arxiv.org/abs/2406.05882.

    Sorts both and subtracts; the k-th smallest difference belongs to the element of `first` that is the k-th
    smallest.

    Args:
        first: The sample that should dominate, (batch,), nats.
        second: The sample that it is compared with, (batch,), nats.

    Returns:
        Margin of each element of `first`, in its order, (batch,), nats.
    """
    ranks = first.argsort().argsort()
    return first - second.sort().values[ranks]
