"""The best reward reachable at each KL, from samples and their rewards: no training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "MIN_EFFECTIVE_SAMPLES",
    "FrontierPoint",
    "best_at_kl",
    "mixture_log_weights",
    "reward_at_kl",
    "reweighted_frontier",
    "share_of_limit",
]

MIN_EFFECTIVE_SAMPLES = 50.0
"""Below this many effective samples a point of the frontier is not to be trusted."""

_BETA_RANGE = (1e-4, 1e6)


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """The optimal policy pi* = pi_ref exp(r / beta) / Z at one beta.

    Attributes:
        beta: Strength of the KL penalty.
        reward: E_{pi*}[r].
        kl: KL(pi* || pi_ref), nats.
        effective_sample_size: 1 / sum of squared weights; with several prompts, that of the worst one.
    """

    beta: float
    reward: float
    kl: float
    effective_sample_size: float

    @property
    def is_reliable(self) -> bool:
        """Whether enough samples carry the weight."""
        return self.effective_sample_size >= MIN_EFFECTIVE_SAMPLES

    def tells(self, kl: float) -> bool:
        """Whether it is the limit at a KL, nats, with twice as many effective samples as are asked for.

        Where nothing is left to gain it is so at every larger KL.
        """
        is_there = self.kl > 0.99 * kl or self.beta < 1.01 * _BETA_RANGE[0]
        return is_there and self.effective_sample_size >= 2 * MIN_EFFECTIVE_SAMPLES


def reweighted_frontier(
    rewards: Tensor,
    *,
    betas: Sequence[float],
    log_weights: Tensor | None = None,
) -> list[FrontierPoint]:
    """Reward and KL of the optimum of the KL-constrained objective, Eq. 4 of https://arxiv.org/abs/2305.18290.

    With completions y drawn from pi_ref, self-normalised weights w ~ exp(r(y) / beta) turn averages over y
    into averages under pi*: E_{pi*}[r] = sum w r, and KL(pi* || pi_ref) = sum w log(n w). No policy has more
    reward at the same KL. The estimate cannot exceed log n: it needs about exp(KL) samples.

    With completions from another distribution q that lies nearer to pi*, such as a trained policy, pass
    log pi_ref(y) - log q(y) and the weights become exp(r / beta) pi_ref / q. This reaches KLs that samples
    from pi_ref do not.

    Args:
        rewards: r(y), (samples,), or (prompts, samples) to normalise the weights for each prompt, as Z(x)
            does, and average over prompts.
        betas: Each above 0.
        log_weights: log pi_ref(y) - log q(y), of the shape of `rewards`, nats; None where q is pi_ref.

    Returns:
        One point for each beta, in their order.

    Raises:
        ValueError: If `betas` holds one that is not above 0, or a shape is wrong.
    """
    wrong = [beta for beta in betas if not beta > 0]
    if wrong:
        raise ValueError(f"`betas` must be above 0, got {wrong[0]}")
    table, offsets = _tables(rewards, log_weights)
    return [_point(table, offsets, beta) for beta in betas]


def best_at_kl(rewards: Tensor, *, kl: float, log_weights: Tensor | None = None) -> FrontierPoint:
    """The point of the frontier at a given KL, found by bisection over beta.

    Where `kl` is more than the samples can show, the point at the smallest beta comes back, with a smaller
    KL and few effective samples.

    Args:
        rewards: See `reweighted_frontier`.
        kl: KL(pi* || pi_ref) to meet, nats, above 0.
        log_weights: See `reweighted_frontier`.

    Raises:
        ValueError: If `kl` is not above 0, or a shape is wrong.
    """
    if not kl > 0:
        raise ValueError(f"`kl` must be above 0, got {kl=}")
    table, offsets = _tables(rewards, log_weights)
    low, high = (math.log(beta) for beta in _BETA_RANGE)
    for _ in range(60):
        middle = (low + high) / 2
        if _point(table, offsets, math.exp(middle)).kl > kl:
            low = middle
        else:
            high = middle
    return _point(table, offsets, math.exp(high))


def mixture_log_weights(logratios: Tensor) -> Tensor:
    """Log pi_ref(y) - log q(y) of samples that come in equal numbers from several policies, taken together.

    q is then the equal mixture of all of them (the balance heuristic of multiple importance sampling), in
    which no weight is much above that under the sample's own policy: samples from the reference serve at
    small KLs, those of trained policies at larger ones.

    Args:
        logratios: log pi_k(y) - log pi_ref(y) of every sample under every policy k that was sampled,
            (policies, ...), nats; zeros for the reference itself.

    Returns:
        For `reweighted_frontier` and `best_at_kl`, of the shape (...).

    Raises:
        ValueError: If there is no policy.
    """
    if logratios.dim() < 2 or not len(logratios):
        raise ValueError(f"`logratios` must be (policies, ...), got shape {tuple(logratios.shape)}")
    return math.log(len(logratios)) - logratios.double().logsumexp(0)


def reward_at_kl(kls: Sequence[float], rewards: Sequence[float], *, kl: float) -> float:
    """A curve's reward at a KL between two of its points: linear in the root of the KL.

    The root, since the best reward grows with it: for rewards that are normal under the reference with
    standard deviation s, the best reward at a KL is s sqrt(2 KL) above the mean.

    Args:
        kls: KL of each point, nats, in any order, none negative.
        rewards: Reward of each point.
        kl: Where to read the curve, nats.

    Returns:
        The reward; NaN where the curve does not reach on both sides, for nothing is extrapolated.

    Raises:
        ValueError: If the points are not as many KLs as rewards, or a KL is negative.
    """
    if len(kls) != len(rewards):
        raise ValueError(f"`rewards` must be as many as `kls` ({len(kls)}), got {len(rewards)}")
    negative = [value for value in (*kls, kl) if value < 0]
    if negative:
        raise ValueError(f"`kls` and `kl` must not be negative, got {negative[0]}")
    points = sorted(zip(kls, rewards, strict=True))
    for (left, below), (right, above) in itertools.pairwise(points):
        if left <= kl <= right:
            width = math.sqrt(right) - math.sqrt(left)
            part = (math.sqrt(kl) - math.sqrt(left)) / width if width else 0.5
            return below + part * (above - below)
    return math.nan


def share_of_limit(reward: float, *, limit: float, reference: float) -> float:
    """What part of the reachable gain a policy has: (reward - reference) / (limit - reference).

    A gain, since rewards are defined up to a constant only.

    Args:
        reward: Mean reward of the policy.
        limit: Best mean reward at the policy's KL.
        reference: Mean reward of the reference.

    Returns:
        About 0 to 1; NaN where nothing can be gained.
    """
    return (reward - reference) / (limit - reference) if limit > reference else math.nan


def _tables(rewards: Tensor, log_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rewards and log-weights as (prompts, samples), float64."""
    if rewards.dim() not in (1, 2) or not rewards.numel():
        raise ValueError(
            f"`rewards` must be (samples,) or (prompts, samples), and not empty, got {tuple(rewards.shape)}"
        )
    if log_weights is not None and log_weights.shape != rewards.shape:
        raise ValueError(
            f"`log_weights` must have the shape of `rewards` {tuple(rewards.shape)}, "
            f"got {tuple(log_weights.shape)}"
        )
    table = rewards.double().reshape(-1, rewards.shape[-1])
    offsets = torch.zeros_like(table) if log_weights is None else log_weights.double().view_as(table)
    return table, offsets


def _point(rewards: Tensor, offsets: Tensor, beta: float) -> FrontierPoint:
    log_weights = rewards / beta + offsets
    # Z is self-normalised too, so that the KL is that between two distributions over the samples: never
    # negative, and falling in beta.
    log_z = log_weights.logsumexp(-1) - offsets.logsumexp(-1)
    weights = log_weights.softmax(-1)
    reward = (weights * rewards).sum(-1)
    return FrontierPoint(
        beta=beta,
        reward=float(reward.mean()),
        kl=float((reward / beta - log_z).mean()),
        effective_sample_size=float((1 / weights.square().sum(-1)).min()),
    )
