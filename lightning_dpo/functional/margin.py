"""Losses on the margin Delta = s(r_chosen) - s(r_rejected) between the two completions' scores.

Each takes the margin of every pair, (batch,), and gives the loss of every pair, (batch,). The mean over the
batch is left to the caller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

__all__ = [
    "discopop_loss",
    "dpo_loss",
    "dpop_loss",
    "exo_loss",
    "hinge_loss",
    "ipo_loss",
    "odpo_loss",
    "rdpo_loss",
    "robust_dpo_loss",
]


def dpo_loss(delta: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation, Eq. 7 of https://arxiv.org/abs/2305.18290; conservative with smoothing.

    With margins of scores per token it is length-normalised DPO (https://arxiv.org/abs/2405.14734).

    Args:
        delta: Margin of each pair, (batch,), nats.
        beta: Strength of the KL constraint: rewards are beta times the scores.
        label_smoothing: Assumed probability that a label is flipped (conservative DPO,
            https://ericmitchell.ai/cdpo.pdf).

    Returns:
        Loss of each pair, (batch,).
    """
    logits = beta * delta
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def dpop_loss(delta: Tensor, *, chosen_logratio: Tensor, beta: float, anchor: float) -> Tensor:
    """DPO-Positive, https://arxiv.org/abs/2402.13228: no credit while the chosen completion is losing ground.

    Args:
        delta: Margin of each pair, (batch,), nats.
        chosen_logratio: log pi(y|x) - log pi_ref(y|x) of the chosen completions, (batch,), nats.
        beta: Strength of the KL constraint.
        anchor: The paper's lambda: nats taken off the margin for each nat that the chosen completion lost.

    Returns:
        Loss of each pair, (batch,).
    """
    return dpo_loss(delta - anchor * relu(-chosen_logratio), beta=beta)


def rdpo_loss(delta: Tensor, *, length_difference: Tensor, beta: float, length_penalty: float) -> Tensor:
    """Length-regularised DPO, R-DPO, https://arxiv.org/abs/2403.19159.

    Args:
        delta: Margin of each pair, (batch,), nats.
        length_difference: Tokens of the chosen completion less those of the rejected one, (batch,).
        beta: Strength of the KL constraint.
        length_penalty: The paper's alpha: reward that a token costs.

    Returns:
        Loss of each pair, (batch,).
    """
    # What labels say of a pair is explained by length first; the policy learns the rest.
    return -logsigmoid(beta * delta + length_penalty * length_difference.to(delta.dtype))


def odpo_loss(delta: Tensor, *, offset: Tensor, beta: float) -> Tensor:
    """DPO with an offset, ODPO, https://arxiv.org/abs/2402.10571.

    Args:
        delta: Margin of each pair, (batch,), nats.
        offset: By how much the rewards of each pair should differ, (batch,), in units of beta * delta.
        beta: Strength of the KL constraint.

    Returns:
        Loss of each pair, (batch,).
    """
    return -logsigmoid(beta * delta - offset)


def ipo_loss(delta: Tensor, *, beta: float) -> Tensor:
    """Identity preference optimisation, Eq. 17 of https://arxiv.org/abs/2310.12036.

    Args:
        delta: Margin of each pair, (batch,), nats; per token when length-normalised.
        beta: The paper's tau; the loss is zero where delta = 1 / (2 beta).

    Returns:
        Loss of each pair, (batch,).
    """
    return (delta - 1 / (2 * beta)) ** 2


def hinge_loss(delta: Tensor, *, beta: float) -> Tensor:
    """Hinge loss of SLiC on the log-ratio margin, as RSO states it (https://arxiv.org/abs/2309.06657).

    Args:
        delta: Margin of each pair, (batch,), nats.
        beta: The loss is zero from delta = 1 / beta.

    Returns:
        Loss of each pair, (batch,).
    """
    return relu(1 - beta * delta)


def robust_dpo_loss(delta: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO, https://arxiv.org/abs/2403.00409: its mean over flipped labels is DPO's over clean ones.

    Args:
        delta: Margin of each pair, (batch,), nats.
        beta: Strength of the KL constraint.
        label_smoothing: Probability that a label is flipped, below 1/2.

    Returns:
        Loss of each pair, (batch,); negative where the margin is large.
    """
    logits = beta * delta
    clean, flipped = -logsigmoid(logits), -logsigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_loss(delta: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Efficient exact optimisation for pairs, Eq. 16 of https://arxiv.org/abs/2402.00856.

    KL(p || q) between the policy's preferences p = (sigmoid(beta delta), sigmoid(-beta delta)) and the
    labels' q = (1 - label_smoothing, label_smoothing).

    Args:
        delta: Margin of each pair, (batch,), nats.
        beta: Strength of the KL constraint.
        label_smoothing: Probability of the other label, above 0.

    Returns:
        Loss of each pair, (batch,), nats.
    """
    logits = beta * delta
    chosen = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(label_smoothing))
    return chosen + rejected


def discopop_loss(delta: Tensor, *, beta: float, tau: float) -> Tensor:
    """DiscoPOP, Eq. 5 of https://arxiv.org/abs/2406.08414: logistic below, exponential above a margin of 0.

    Args:
        delta: Margin of each pair, (batch,), nats.
        beta: Strength of the KL constraint.
        tau: Width of the change from one to the other, in units of beta * delta; at most 1.

    Returns:
        Loss of each pair, (batch,).
    """
    logits = beta * delta
    logistic = torch.sigmoid(-logits / tau) * -logsigmoid(logits)
    # The exponential is added to the log of its weight: exp(-logits) alone overflows where the weight is 0.
    return logistic + torch.exp(logsigmoid(logits / tau) - logits)
