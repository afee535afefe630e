"""The best reward at each KL, from samples of the reference and of the policies that went furthest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dpo.evaluation import (
    MIN_EFFECTIVE_SAMPLES,
    FrontierPoint,
    best_at_kl,
    mixture_log_weights,
    reweighted_frontier,
    share_of_limit,
)

__all__ = ["Limit", "pick_policies"]

_CURVE_BETAS = torch.logspace(2.5, -2.0, 150).tolist()
"""Relative to the standard deviation of the reference's rewards."""


@dataclass(frozen=True)
class Limit:
    """What no policy exceeds.

    Attributes:
        rewards: Of samples of the reference and of some policies, (prompts, samples).
        log_weights: log reference - log of what they were drawn from, (prompts, samples).
        reference: Mean reward of the reference.
        policies: How many policies were sampled besides the reference.
    """

    rewards: Tensor
    log_weights: Tensor
    reference: float
    policies: int = 0

    @classmethod
    def of(cls, rewards: Sequence[Tensor], logratios: Sequence[Tensor], *, prompts: int) -> Limit:
        """Take samples together.

        Args:
            rewards: Of the samples of each policy, the reference first, (samples,) each, prompt by prompt.
            logratios: log policy - log reference of all of these samples, laid end to end, under each policy
                but the reference, (policies * samples,) each.
            prompts: How many there are.
        """
        policies = len(rewards)
        table = torch.stack([each.double().view(prompts, -1) for each in rewards], dim=1)
        zeros = torch.zeros(table.numel(), dtype=torch.float64)
        under = torch.stack([zeros, *(each.double() for each in logratios)])
        under = under.view(policies, policies, prompts, -1).transpose(1, 2).reshape(policies, prompts, -1)
        return cls(
            table.reshape(prompts, -1),
            mixture_log_weights(under),
            float(rewards[0].double().mean()),
            policies - 1,
        )

    def joined(self, other: Limit) -> Limit:
        """With further samples of the same policies, as many of each."""
        sizes = self.rewards.shape[1], other.rewards.shape[1]
        return Limit(
            torch.cat([self.rewards, other.rewards], dim=1),
            torch.cat([self.log_weights, other.log_weights], dim=1),
            (sizes[0] * self.reference + sizes[1] * other.reference) / sum(sizes),
            self.policies,
        )

    def at(self, kl: float) -> FrontierPoint:
        """The best reward at a KL."""
        return best_at_kl(self.rewards, kl=kl, log_weights=self.log_weights)

    def is_known(self, *, up_to: float) -> bool:
        """Whether twice as many effective samples as are asked for tell the limit at a KL."""
        best = self.at(up_to)
        return best.kl > 0.99 * up_to and best.effective_sample_size >= 2 * MIN_EFFECTIVE_SAMPLES

    def share(self, reward: float, *, kl: float) -> float:
        """What part of the gain that is reachable at a policy's KL it has.

        NaN where too few samples carry the weight, or the KL is 0.

        Args:
            reward: The policy's mean reward.
            kl: Its KL, nats.
        """
        if not kl > 0:
            return math.nan
        best = self.at(kl)
        if not best.is_reliable:
            return math.nan
        return share_of_limit(reward, limit=best.reward, reference=self.reference)

    def curve(self, *, up_to: float) -> list[FrontierPoint]:
        """Points from KL 0 to `up_to`, those that can be trusted."""
        scale = float(self.rewards.std()) or 1.0
        points = reweighted_frontier(
            self.rewards, betas=[scale * beta for beta in _CURVE_BETAS], log_weights=self.log_weights
        )
        return [point for point in points if point.is_reliable and point.kl <= up_to]


def pick_policies(
    points: Sequence[tuple[float, float]], *, reference: float, kl: float, count: int
) -> list[int]:
    """Which policies to sample for the limit: those nearest to the best policy at a KL.

    A policy's KL from pi* = pi_ref exp(r / beta) / Z is log Z less (E[r] - beta KL) / beta, so that the
    nearest have the highest E[r] - beta KL. beta is the slope there of the points' own upper hull.

    Args:
        points: KL and reward of each policy.
        reference: The reference's reward, at KL 0.
        kl: Up to where the limit is wanted, nats.
        count: How many to pick at most.

    Returns:
        Their indices, the nearest one first.
    """
    beta = _hull_slope([(0.0, reference), *points], kl=kl)
    order = sorted(range(len(points)), key=lambda i: beta * points[i][0] - points[i][1])
    return order[:count]


def _hull_slope(points: Sequence[tuple[float, float]], *, kl: float) -> float:
    """The slope at a KL of the upper hull of points (KL, reward), or of its last rise."""
    hull: list[tuple[float, float]] = []
    for point in sorted(points):
        # Left of the point before there is another one, and that point lies below the line between the two.
        while len(hull) > 1 and _slope(hull[-2], point) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        if not hull or point[1] > hull[-1][1]:
            hull.append(point)
    slopes = [_slope(left, right) for left, right in itertools.pairwise(hull) if left[0] < kl]
    return slopes[-1] if slopes else 0.0


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    width = right[0] - left[0]
    return (right[1] - left[1]) / width if width else math.inf
