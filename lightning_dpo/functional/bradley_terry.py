"""The Bradley-Terry model of preferences, which reward models are fitted to."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["bradley_terry_loss"]


def bradley_terry_loss(reward_margin: Tensor, *, least_margin: Tensor | float = 0.0) -> Tensor:
    """Negative log-likelihood of a preference, Eq. 2 of https://arxiv.org/abs/2305.18290.

    By Eq. 1 there the chosen completion is preferred with probability sigmoid(r(chosen) - r(rejected)).

    Args:
        reward_margin: r(chosen) - r(rejected), (batch,).
        least_margin: m >= 0, by how much rewards should differ at least, (batch,) or one for all; Eq. 2 of
            https://arxiv.org/abs/2307.09288.

    Returns:
        Loss of each pair, (batch,).
    """
    return -F.logsigmoid(reward_margin - least_margin)
