"""Losses on the margin Delta = s(r_chosen) - s(r_rejected) between the two completions' scores.

Each takes the margin of every pair, (batch,), and gives the loss of every pair, (batch,). The mean over the
batch is left to the caller.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

__all__ = ["dpo_loss", "hinge_loss", "ipo_loss"]


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
