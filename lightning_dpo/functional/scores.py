"""Score functions s(r) of a completion's log-ratio, one per divergence (f-DPO, https://arxiv.org/abs/2309.16240).

With an f-divergence in place of the reverse KL in the constraint, the optimal policy satisfies
reward = beta * f'(pi / pi_ref) + constant, so that s(r) = f'(exp(r)) stands where DPO has the log-ratio r.
Every score is 0 at r = 0 and has slope 1 there (1/2 for Jensen-Shannon, 2 for chi-squared plus KL).
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

__all__ = [
    "EXPONENT_LIMIT",
    "Divergence",
    "alpha_divergence_score",
    "chi_squared_kl_score",
    "divergence_score",
    "forward_kl_score",
    "js_divergence_score",
    "reverse_kl_score",
]

Divergence: TypeAlias = Literal[
    "reverse_kl", "forward_kl", "js_divergence", "alpha_divergence", "chi_squared_kl"
]
"""Names of the divergences between policy and reference."""

EXPONENT_LIMIT = 30.0
"""Exponent from which `exp` goes on as its tangent.

A log-ratio is a sum over tokens, so exp(-r) leaves float32 where training has gone wrong, and infinity minus
infinity is NaN. At 30 the squared loss of a tangent at |r| = 1e4 still fits into float32. Cutting the
exponent off instead would leave exactly those completions without a gradient.
"""


def _expm1_with_tangent(exponent: Tensor) -> Tensor:
    # relu, not a difference to the clamped exponent: two gradients of 1e13 would cancel only roughly.
    beyond = relu(exponent - EXPONENT_LIMIT)
    return torch.expm1(exponent.clamp(max=EXPONENT_LIMIT)) + math.exp(EXPONENT_LIMIT) * beyond


def reverse_kl_score(logratio: Tensor) -> Tensor:
    """Score of the reverse KL, s(r) = r: DPO as published.

    Args:
        logratio: r = log pi(y|x) - log pi_ref(y|x), (batch,), nats.

    Returns:
        s(r), (batch,).
    """
    return logratio


def forward_kl_score(logratio: Tensor) -> Tensor:
    """Score of the forward KL, s(r) = 1 - exp(-r); exp goes on as its tangent from `EXPONENT_LIMIT`.

    Args:
        logratio: r = log pi(y|x) - log pi_ref(y|x), (batch,), nats.

    Returns:
        s(r), (batch,).
    """
    return -_expm1_with_tangent(-logratio)


def js_divergence_score(logratio: Tensor) -> Tensor:
    """Score of the Jensen-Shannon divergence, s(r) = ln 2 + log sigmoid(r).

    Args:
        logratio: r = log pi(y|x) - log pi_ref(y|x), (batch,), nats.

    Returns:
        s(r), (batch,).
    """
    return math.log(2) + logsigmoid(logratio)


def alpha_divergence_score(logratio: Tensor, *, alpha: float) -> Tensor:
    """Score of the alpha-divergence, s(r) = (exp((alpha - 1) r) - 1) / (alpha - 1).

    It joins the forward KL (alpha = 0) to the reverse KL (alpha = 1). The paper's parameter is 1 - alpha. exp
    goes on as its tangent from `EXPONENT_LIMIT`.

    Args:
        logratio: r = log pi(y|x) - log pi_ref(y|x), (batch,), nats.
        alpha: Between 0 and 1.

    Returns:
        s(r), (batch,).
    """
    if alpha == 1.0:
        return logratio
    return _expm1_with_tangent((alpha - 1) * logratio) / (alpha - 1)


def chi_squared_kl_score(logratio: Tensor) -> Tensor:
    """Score of the chi-squared divergence plus the reverse KL, s(r) = exp(r) - 1 + r: chi-PO.

    It is the link function phi(z) = z + log z of https://arxiv.org/abs/2407.13399 at z = exp(r), less phi(1),
    which the margin of whole completions cancels and which would be left over per token. To give a completion
    z times the reference's probability takes a reward that grows like z where DPO's grows like log z. exp
    goes on as its tangent from `EXPONENT_LIMIT`.

    Args:
        logratio: r = log pi(y|x) - log pi_ref(y|x), (batch,), nats.

    Returns:
        s(r), (batch,).
    """
    return _expm1_with_tangent(logratio) + logratio


def divergence_score(
    logratio: Tensor, *, divergence: Divergence = "reverse_kl", alpha: float = 0.5
) -> Tensor:
    """Score of a divergence given by name.

    Args:
        logratio: r = log pi(y|x) - log pi_ref(y|x), (batch,), nats.
        divergence: Name of the divergence.
        alpha: Parameter of "alpha_divergence"; the other divergences do not read it.

    Returns:
        s(r), (batch,).

    Raises:
        ValueError: If there is no divergence of this name.
    """
    match divergence:
        case "reverse_kl":
            return reverse_kl_score(logratio)
        case "forward_kl":
            return forward_kl_score(logratio)
        case "js_divergence":
            return js_divergence_score(logratio)
        case "alpha_divergence":
            return alpha_divergence_score(logratio, alpha=alpha)
        case "chi_squared_kl":
            return chi_squared_kl_score(logratio)
    raise ValueError(f"`divergence` must be one of {Divergence.__args__}, got {divergence=}")
