"""Best-of-N: draw N completions, keep the best. What it earns and how far it moves, without drawing more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BestOfN", "best_of_n", "best_of_n_kl_bound", "best_of_n_policy"]


@dataclass(frozen=True, slots=True)
class BestOfN:
    """The policy that draws `n` completions of the reference and keeps the one with the highest score.

    Attributes:
        n: Completions drawn for each that is kept.
        reward: Expected score of the one that is kept, mean over prompts.
        reward_error: Its standard error from the drawing of completions, the prompts as given; 0 where the
            distribution was given.
        kl: KL(best-of-n || reference), nats, mean over prompts; ties of score are broken at random.
        kl_error: Its standard error, likewise.
        kl_bound: log n - (n - 1) / n, which `kl` reaches where no two completions have the same score.
        effective_sample_size: 1 / sum of squared weights of the completions that it is told from; with
            several prompts, that of the worst one. Infinite where the distribution was given.
    """

    n: int
    reward: float
    reward_error: float
    kl: float
    kl_error: float
    kl_bound: float
    effective_sample_size: float = math.inf


def best_of_n_kl_bound(n: int) -> float:
    """Log n - (n - 1) / n, nats: an upper bound of the KL, Section 3 of https://arxiv.org/abs/2401.01879.

    Args:
        n: Completions drawn for each that is kept, at least 1.

    Raises:
        ValueError: If `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n=}")
    return math.log(n) - (n - 1) / n


def best_of_n(scores: Tensor, n: int, *, log_weights: Tensor | None = None) -> BestOfN:
    """Reward and KL of best-of-n, from scores of at least n completions of the reference for each prompt.

    The reward is the mean of the best of every n-subset of the completions, an order statistic without
    bias. The KL starts from the bound and takes off what ties cost: where many completions share a score,
    as when the model says few different things, choosing among them moves nothing. A score that was drawn
    once counts as having no ties, so the estimate is a little high for distributions of many rare values.

    With completions from another distribution q, such as those that `fit_optimum` drew, pass log pi_ref - log
    q: best-of-n is then that of the reference as these weights tell it, the formulas of `best_of_n_policy`,
    and n may be thousands of times what the reference was sampled. See `effective_sample_size`.

    Args:
        scores: Of completions drawn from the reference, (prompts, samples), or (samples,) for one prompt.
        n: Completions drawn for each that is kept, from 1 to the number of samples. Errors are small, and
            estimated well, where the samples are several times as many. With weights, any from 1.
        log_weights: Of the shape of `scores`, nats; None where they come from the reference.

    Raises:
        ValueError: If `scores` has another shape or one that is not finite, or `n` is out of range.
    """
    if scores.dim() not in (1, 2) or not scores.numel():
        raise ValueError(
            f"`scores` must be (prompts, samples) or (samples,), and not empty, got {tuple(scores.shape)}"
        )
    if not scores.isfinite().all():
        raise ValueError(f"`scores` must be finite, got {int((~scores.isfinite()).sum())} that are not")
    if log_weights is not None and log_weights.shape != scores.shape:
        raise ValueError(
            f"`log_weights` must have the shape of `scores` {tuple(scores.shape)}, "
            f"got {tuple(log_weights.shape)}"
        )
    bound = best_of_n_kl_bound(n)
    samples = scores.shape[-1]
    if log_weights is None and n > samples:
        raise ValueError(
            f"`n` must be from 1 to the {samples} samples of each prompt, got {n=}; draw more samples"
        )
    table = scores.double().reshape(-1, samples).cpu()
    offsets = torch.zeros_like(table) if log_weights is None else log_weights.double().view_as(table).cpu()
    prompts = [_OfPrompt.of(row, mass, n) for row, mass in zip(table, offsets.softmax(-1), strict=True)]
    rewards = torch.stack([prompt.reward for prompt in prompts])
    if log_weights is None:
        rewards = (table.sort(-1).values * _subset_weights(samples, n)).sum(-1)
    return BestOfN(
        n=n,
        reward=float(rewards.mean()),
        reward_error=_standard_error([prompt.reward_variance for prompt in prompts]),
        kl=float(torch.stack([prompt.kl for prompt in prompts]).mean()),
        kl_error=_standard_error([prompt.kl_variance for prompt in prompts]),
        kl_bound=bound,
        effective_sample_size=min(prompt.effective_sample_size for prompt in prompts),
    )


def best_of_n_policy(
    probabilities: Tensor,
    *,
    scores: Tensor,
    n: int,
) -> tuple[Tensor, BestOfN]:
    """Best-of-n of a distribution that can be written down, exactly.

    Section 2 of https://arxiv.org/abs/2401.01879 for scores that may tie: with F the distribution function of
    the score, all outcomes of score s together have F(s)^n - F(s-)^n, shared as the reference shares it.

    Args:
        probabilities: Of each outcome under the reference, (outcomes,), summing to 1.
        scores: Of each outcome, (outcomes,).
        n: Completions drawn for each that is kept, at least 1.

    Returns:
        Probability of each outcome under best-of-n, (outcomes,), float64, and what it earns.

    Raises:
        ValueError: If the shapes differ, or `probabilities` is no distribution, or `n` is below 1.
    """
    mass = probabilities.double()
    if mass.dim() != 1 or scores.shape != mass.shape:
        raise ValueError(
            f"`probabilities` and `scores` must both be (outcomes,), got {tuple(mass.shape)} and "
            f"{tuple(scores.shape)}"
        )
    if not (mass >= 0).all() or abs(float(mass.sum()) - 1) > 1e-6:
        raise ValueError(f"`probabilities` must be at least 0 and sum to 1, got {float(mass.sum())} in all")
    bound = best_of_n_kl_bound(n)
    values, groups = torch.unique(scores.double(), return_inverse=True)
    together = torch.zeros_like(values).index_add(0, groups, mass)
    upper = together.cumsum(0).clamp(max=1)
    chosen = upper**n - (upper - together).clamp(min=0) ** n
    ratio = torch.where(together > 0, chosen / together, 0.0)
    policy = mass * ratio[groups]
    policy /= policy.sum()
    kl = float(torch.xlogy(policy, torch.where(mass > 0, policy / mass, 1.0)).sum())
    reward = float((policy * scores.double()).sum())
    return policy, BestOfN(n, reward, 0.0, max(kl, 0.0), 0.0, bound)


class _OfPrompt(NamedTuple):
    """Best-of-n of one prompt's samples, and the variances that their drawing gives it, () each."""

    reward: Tensor
    reward_variance: Tensor
    kl: Tensor
    kl_variance: Tensor
    effective_sample_size: float

    @classmethod
    def of(cls, scores: Tensor, mass: Tensor, n: int) -> _OfPrompt:
        """Take samples of these scores and weights, (samples,) each, the weights summing to 1.

        In u, the quantile of the score, best-of-n has the density n u^(n-1). Without ties its KL is the
        integral of density log density, the bound. A score that many share is an interval of u on which only
        the mean of the density counts; by convexity that is less.
        """
        values, groups, counts = torch.unique(scores, return_inverse=True, return_counts=True)
        together = torch.zeros_like(values).index_add(0, groups, mass)
        upper = together.cumsum(0).clamp(max=1)
        lower = (upper - together).clamp(min=0)
        chosen = upper**n - lower**n
        shares = mass * (chosen / together.clamp(min=torch.finfo(torch.float64).tiny))[groups]
        tied = counts > 1
        cost, influence = _cost_of_ties(lower, upper, n, tied=tied)
        squares = torch.zeros_like(values).index_add(0, groups, mass.square())
        size = 1 / squares.sum()
        unbiased = size / (size - 1)
        return cls(
            reward=(chosen * values).sum(),
            reward_variance=unbiased * (_reward_influence(scores, mass, n).square() * mass.square()).sum(),
            kl=(best_of_n_kl_bound(n) - cost).clamp(min=0),
            kl_variance=unbiased * (influence.square() * squares).sum(),
            effective_sample_size=float(shares.sum().square() / shares.square().sum()),
        )


def _subset_weights(samples: int, n: int) -> Tensor:
    """C(i - 1, n - 1) / C(samples, n): how often the i-th lowest is the best of a subset, (samples,)."""
    rank = torch.arange(1, samples + 1, dtype=torch.float64)
    logs = _log_choose(rank - 1, n - 1) - _log_choose(torch.tensor(float(samples), dtype=torch.float64), n)
    return torch.where(rank >= n, logs.exp(), 0.0)


def _log_choose(total: Tensor, chosen: int) -> Tensor:
    """Log C(total, chosen); of no meaning where total is below chosen."""
    rest = (total - chosen).clamp(min=0)
    chosen_ = torch.tensor(float(chosen), dtype=torch.float64)
    return torch.lgamma(total + 1) - torch.lgamma(chosen_ + 1) - torch.lgamma(rest + 1)


def _standard_error(variances: Sequence[Tensor]) -> float:
    """Of the mean over prompts, from each prompt's variance."""
    return float(torch.stack(list(variances)).sum().sqrt() / len(variances))


def _reward_influence(scores: Tensor, mass: Tensor, n: int) -> Tensor:
    """What each sample does to E[max] = integral of 1 - F(t)^n, (samples,).

    The derivative is - n F(t)^(n-1) dF(t); adding mass at s changes F(t) by 1[s <= t] - F(t).
    """
    ordered, order = scores.sort()
    below = mass[order].cumsum(0)[:-1].clamp(max=1)  # F between neighbours
    pull = n * below ** (n - 1) * ordered.diff()
    beyond = pull.flip(0).cumsum(0).flip(0)  # integral from a sample upwards
    influence = (pull * below).sum() - torch.cat([beyond, beyond.new_zeros(1)])
    return torch.empty_like(influence).scatter(0, order, influence)


def _cost_of_ties(lower: Tensor, upper: Tensor, n: int, *, tied: Tensor) -> tuple[Tensor, Tensor]:
    """What ties take off the KL, (), and what a sample of each score does to the KL, (scores,).

    Args:
        lower: Where each score's interval of quantiles begins, (scores,), rising.
        upper: Where it ends.
        n: Completions drawn for each that is kept.
        tied: Which scores several completions have.
    """
    low, high = lower[tied], upper[tied]
    chosen, width = high**n - low**n, high - low
    ratio = (chosen / width).clamp(min=torch.finfo(torch.float64).tiny)
    cost = _entropy_integral(high, n) - _entropy_integral(low, n) - chosen * ratio.log()
    # How the cost changes with either end of its interval, and how each sample moves the ends.
    by_high = _density_log_density(high, n) - _density(high, n) * (ratio.log() + 1) + ratio
    by_low = -_density_log_density(low, n) + _density(low, n) * (ratio.log() + 1) - ratio
    # A sample of the k-th value raises every upper end from k on, and every lower end from k + 1 on.
    pulls = torch.zeros(2, len(lower) + 1, dtype=torch.float64)
    pulls[:, :-1][:, tied] = torch.stack([by_high, by_low])
    reach = pulls.flip(1).cumsum(1).flip(1)
    return cost.sum(), reach[0, :-1] + reach[1, 1:] - (by_high * high).sum() - (by_low * low).sum()


def _density(quantile: Tensor, n: int) -> Tensor:
    return n * quantile ** (n - 1)


def _density_log_density(quantile: Tensor, n: int) -> Tensor:
    density = _density(quantile, n)
    return torch.xlogy(density, density)


def _entropy_integral(quantile: Tensor, n: int) -> Tensor:
    """Integral of density log density from 0 to a quantile u: u^n (log n + (n - 1) (log u - 1 / n))."""
    power = quantile**n
    return power * (math.log(n) - (n - 1) / n) + (n - 1) * torch.xlogy(power, quantile)
