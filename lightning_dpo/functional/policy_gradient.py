"""Proximal policy optimisation with a penalty on the KL from a reference: advantages, objectives, control."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = [
    "ClippedLoss",
    "adapted_kl_coefficient",
    "clipped_policy_loss",
    "clipped_value_loss",
    "gae",
    "k3_kl",
    "kl_penalised_rewards",
    "token_advantages",
    "whiten",
]


class ClippedLoss(NamedTuple):
    """A loss whose gradient ends where the new policy, or value, has gone far enough.

    Attributes:
        losses: Loss of each token.
        clipped: Whether the clipped side was taken, which passes no gradient, of bool.
    """

    losses: Tensor
    clipped: Tensor


def token_advantages(
    logratio: Tensor,
    *,
    values: Tensor,
    scores: Tensor,
    lengths: Tensor,
    coefficient: float,
    **discounts: float,
) -> Tensor:
    """`gae` of `kl_penalised_rewards` for completions that lie end to end, (tokens,).

    Args:
        logratio: log pi(token) - log pi_ref(token), (tokens,), nats.
        values: The value before each token, (tokens,).
        scores: r(x, y) of each completion, (completions,).
        lengths: Tokens of each completion, (completions,), on any device.
        coefficient: beta.
        discounts: `gamma` and `gae_lambda` of `gae`.
    """
    pieces = (torch.split(part, lengths.tolist()) for part in (logratio, values))
    ratios, before = (pad_sequence([*parts], batch_first=True) for parts in pieces)
    lengths = lengths.to(ratios.device)
    rewards = kl_penalised_rewards(ratios, scores=scores, lengths=lengths, coefficient=coefficient)
    is_token = torch.arange(ratios.shape[1], device=ratios.device) < lengths[:, None]
    return gae(rewards, values=before, **discounts)[is_token]


def kl_penalised_rewards(
    logratio: Tensor, *, scores: Tensor, lengths: Tensor, coefficient: float | Tensor
) -> Tensor:
    """Reward of each token, whose sum over a completion is r(x, y) - beta * log(pi / pi_ref).

    Eq. 3 of https://arxiv.org/abs/2305.18290, as https://arxiv.org/abs/1909.08593 spreads it over tokens:
    each bears its own log-ratio, and the last one the score. Of the usual estimators of the KL only this one
    (k1) has a mean whose gradient is the KL's, once it is a part of the reward.

    Args:
        logratio: log pi(token) - log pi_ref(token), 0 after a completion's end, (batch, seq_len), nats.
        scores: r(x, y) of each completion, (batch,).
        lengths: Tokens of each completion, at least 1, (batch,).
        coefficient: beta.

    Returns:
        (batch, seq_len), 0 after a completion's end.
    """
    rewards = -coefficient * logratio
    return rewards.scatter_add(1, (lengths - 1)[:, None], scores[:, None].to(rewards))


def gae(rewards: Tensor, *, values: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation, Eq. 16 of https://arxiv.org/abs/1506.02438.

    A_t = sum over k of (gamma * lambda)^k * delta_{t+k}, delta_t = r_t + gamma * V_{t+1} - V_t, V = 0 at the
    end. Returns, which values are fitted to, are A_t + V_t.

    Args:
        rewards: r_t, 0 after a completion's end, (batch, seq_len).
        values: V_t, the value before token t is chosen, 0 after a completion's end, (batch, seq_len).
        gamma: Discount of each further token.
        gae_lambda: 0 trusts the values (one step), 1 the rewards (Monte Carlo).

    Returns:
        A_t, (batch, seq_len), 0 after a completion's end.
    """
    following = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], dim=1)
    deltas = rewards + gamma * following - values
    advantages = torch.zeros_like(deltas)
    later = deltas.new_zeros(len(deltas))
    for t in reversed(range(deltas.shape[1])):
        later = deltas[:, t] + gamma * gae_lambda * later
        advantages[:, t] = later
    return advantages


def whiten(values: Tensor, *, mean: Tensor, variance: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1, given the moments, which may be those of all ranks."""
    return (values - mean) * (variance + 1e-8).rsqrt()


def clipped_policy_loss(
    logps: Tensor, *, old_logps: Tensor, advantages: Tensor, clip_range: float
) -> ClippedLoss:
    """The clipped surrogate objective with its sign turned, Eq. 7 of https://arxiv.org/abs/1707.06347.

    Args:
        logps: log pi(token) of the policy that trains, (tokens,).
        old_logps: The same under the policy that the tokens were sampled from.
        advantages: A_t, (tokens,).
        clip_range: epsilon, how far pi / pi_old may go from 1.
    """
    ratio = (logps - old_logps).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return ClippedLoss(-torch.minimum(plain, clipped), clipped < plain)


def clipped_value_loss(
    values: Tensor, *, old_values: Tensor, returns: Tensor, clip_range: float
) -> ClippedLoss:
    """Half the squared error of values, (tokens,); a step may not change one by more than a range."""
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    return ClippedLoss(torch.maximum(plain, clipped) / 2, clipped > plain)


def k3_kl(logratio: Tensor) -> Tensor:
    """A term of KL(pi || other) for each token sampled from pi: unbiased and never negative.

    (1 / u) - 1 + log u with u = pi / other (http://joschu.net/blog/kl-approx.html), given log u.
    """
    return torch.expm1(-logratio) + logratio


def adapted_kl_coefficient(coefficient: float, *, kl: float, target: float, gain: float = 0.1) -> float:
    """The next KL coefficient, Section 2.2 of https://arxiv.org/abs/1909.08593.

    It grows where the measured KL is above the target, both in nats per completion, and shrinks below it, by
    at most a fifth of `gain`, the paper's K_beta.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + gain * error)
