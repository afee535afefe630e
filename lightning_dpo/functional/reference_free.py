"""Losses on the policy's log-probs alone.

Each gives the loss of every pair, (batch,). The mean over the batch is left to the caller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

__all__ = ["cpo_loss", "log_odds", "orpo_loss", "simpo_loss", "unlikelihood_loss"]

_NEAR_ONE = -1.2e-7
"""About the last log-probability that float32 tells from 0; from there, log odds go on as their tangent."""


def simpo_loss(
    chosen_mean_logps: Tensor, *, rejected_mean_logps: Tensor, beta: float, gamma: float
) -> Tensor:
    """SimPO, Eq. 6 of https://arxiv.org/abs/2405.14734.

    Args:
        chosen_mean_logps: log pi(chosen) per token, (batch,), nats.
        rejected_mean_logps: log pi(rejected) per token, (batch,), nats.
        beta: Scale of the rewards.
        gamma: Margin by which the chosen reward should exceed the rejected one.

    Returns:
        Loss of each pair, (batch,).
    """
    return -logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps) - gamma)


def log_odds(logps: Tensor) -> Tensor:
    """Log p - log(1 - p), from log p, without the overflow at p = 1.

    Args:
        logps: Log-probabilities, at most 0, (batch,).

    Returns:
        Log odds, (batch,).
    """
    below = logps.clamp(max=_NEAR_ONE)
    slope = -1 / math.expm1(_NEAR_ONE)
    return below - torch.log(-torch.expm1(below)) + slope * relu(logps - _NEAR_ONE)


def orpo_loss(chosen_mean_logps: Tensor, *, rejected_mean_logps: Tensor, odds_weight: float) -> Tensor:
    """Odds ratio preference optimisation, Eq. 6 and 7 of https://arxiv.org/abs/2403.07691.

    Args:
        chosen_mean_logps: log pi(chosen) per token, (batch,), nats.
        rejected_mean_logps: log pi(rejected) per token, (batch,), nats.
        odds_weight: The paper's lambda, the weight of the odds ratio beside the likelihood.

    Returns:
        Loss of each pair, (batch,).
    """
    log_odds_ratio = log_odds(chosen_mean_logps) - log_odds(rejected_mean_logps)
    return -chosen_mean_logps - odds_weight * logsigmoid(log_odds_ratio)


def cpo_loss(chosen_logps: Tensor, *, rejected_logps: Tensor, beta: float, sft_weight: float) -> Tensor:
    """Contrastive preference optimisation, https://arxiv.org/abs/2401.08417.

    Args:
        chosen_logps: log pi(chosen), (batch,), nats.
        rejected_logps: log pi(rejected), (batch,), nats.
        beta: Scale of the rewards.
        sft_weight: Weight of the chosen completions' likelihood, 1 in the paper.

    Returns:
        Loss of each pair, (batch,).
    """
    return -logsigmoid(beta * (chosen_logps - rejected_logps)) - sft_weight * chosen_logps


def unlikelihood_loss(chosen_logps: Tensor, *, rejected_logps: Tensor, alpha: float) -> Tensor:
    """Likelihood of the chosen, unlikelihood of the rejected: a baseline of https://arxiv.org/abs/2305.18290.

    Args:
        chosen_logps: log pi(chosen), (batch,), nats.
        rejected_logps: log pi(rejected), (batch,), nats.
        alpha: Weight of the rejected.

    Returns:
        Loss of each pair, (batch,); without a lower bound for alpha above 0.
    """
    return -chosen_logps + alpha * rejected_logps
