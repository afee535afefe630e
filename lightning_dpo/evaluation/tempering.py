"""Samples of the policies that are best at each KL, from a reference and a judge: nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dpo.evaluation.frontier import mixture_log_weights
from lightning_dpo.evaluation.sampling import Sample

__all__ = ["TemperedSamples", "tempered_samples"]

_KEPT = 0.5
"""Share of the samples that are effective after a step, on the worst prompt."""

_MOST_LEVELS = 100


class TemperedSamples(NamedTuple):
    """For `reweighted_frontier` and `best_at_kl`.

    Attributes:
        rewards: Of the samples of all levels, (prompts, levels * samples_per_prompt).
        log_weights: log pi_ref(y) - log q(y), q the equal mixture of the levels, of the same shape.
        accepted: Share of the moves that were accepted at each level but the first.
    """

    rewards: Tensor
    log_weights: Tensor
    accepted: list[float]


def tempered_samples(
    prompts: Sequence[Sequence[int]],
    *,
    complete: Callable[[Sequence[Sequence[int]], int], list[Sample]],
    judge: Callable[[Sequence[Sample]], Tensor],
    kl: float,
    samples_per_prompt: int,
    max_new_tokens: int,
    moves: int = 5,
    seed: int = 0,
) -> TemperedSamples:
    """Sample pi_k = pi_ref exp(r / beta_k) / Z_k for falling beta_k, up to a KL.

    A sequential Monte Carlo sampler (https://doi.org/10.1111/j.1467-9868.2006.00553.x): samples of the
    reference are reweighted to the next level, as far as half of them stay effective, resampled, and moved. A
    move cuts a completion at a token drawn at random, lets the reference go on from there, and accepts by
    Metropolis and Hastings: the reference's own probabilities cancel, and what is left is exp(dr / beta)
    times the ratio of the two lengths, old to new. The mean of the weights gives Z_k, so that a sample's
    log pi_k / pi_ref = r / beta_k - log Z_k is known from its reward.

    Args:
        prompts: Token ids of each.
        complete: Gives the reference's completions of token ids, at most `max_new_tokens` long, and a seed.
        judge: Gives rewards, (samples,).
        kl: Mean KL over the prompts to reach, nats.
        samples_per_prompt: At each level.
        max_new_tokens: Longest completion.
        moves: Of each sample at each level. Samples share ancestors until they are moved.
        seed: Of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    n = samples_per_prompt
    said = complete([prompt for prompt in prompts for _ in range(n)], _seed(generator))
    rewards = judge(said).double().view(len(prompts), n)
    inverse, log_z = 0.0, torch.zeros(len(prompts), 1, dtype=torch.float64)
    levels, accepted = [(inverse, log_z, rewards)], []
    reached = 0.0
    while reached < kl and len(levels) < _MOST_LEVELS:
        step = _step(rewards)
        if step is None:  # the best that was found has half of all samples: beta could be 0
            break
        inverse += step
        log_z = log_z + (step * rewards).logsumexp(1, keepdim=True) - math.log(n)
        numbers = _resampled((step * rewards).softmax(1), generator)
        said = [said[number] for number in numbers.flatten().tolist()]
        rewards = rewards.flatten()[numbers]
        share = []
        for _ in range(moves):
            places = zip(_uniform(said, generator), said, strict=True)
            cut = [int(part * len(sample.completion_ids)) for part, sample in places]
            tried = _regenerated(said, cut, complete, max_new_tokens, _seed(generator))
            new = judge(tried).double()
            lengths = torch.tensor([[len(s.completion_ids) for s in each] for each in (said, tried)]).log()
            odds = inverse * (new - rewards.flatten()) + lengths[0] - lengths[1]
            is_taken = torch.tensor(_uniform(said, generator)).log() < odds
            said = [t if taken else s for s, t, taken in zip(said, tried, is_taken.tolist(), strict=True)]
            rewards = torch.where(is_taken, new, rewards.flatten()).view_as(rewards)
            share.append(float(is_taken.double().mean()))
        levels.append((inverse, log_z, rewards))
        accepted.append(sum(share) / max(len(share), 1))
        reached = float((inverse * rewards.mean(1, keepdim=True) - log_z).mean())
    pool = torch.cat([each for _, _, each in levels], dim=1)
    logratios = torch.stack([at * pool - z for at, z, _ in levels])
    return TemperedSamples(pool, mixture_log_weights(logratios), accepted)


def _regenerated(
    said: Sequence[Sample],
    cut: Sequence[int],
    complete: Callable[[Sequence[Sequence[int]], int], list[Sample]],
    longest: int,
    seed: int,
) -> list[Sample]:
    """Completions that keep their first tokens and are new from there."""
    tried = list(said)
    # By what is left to say, for a batch is done when its longest completion is.
    order = sorted(range(len(said)), key=lambda number: len(said[number].completion_ids) - cut[number])
    heads = [list(said[number].completion_ids[: cut[number]]) for number in order]
    starts = [[*said[number].prompt_ids, *head] for number, head in zip(order, heads, strict=True)]
    for number, head, tail in zip(order, heads, complete(starts, seed), strict=True):
        ids = [*head, *tail.completion_ids]
        is_whole = tail.finished and len(ids) <= longest
        tried[number] = Sample(said[number].prompt_ids, ids[:longest], is_whole)
    return tried


def _step(rewards: Tensor) -> float | None:
    """By how much 1 / beta may grow; None where it may without end."""

    def kept(step: float) -> float:
        return float((1 / (step * rewards).softmax(1).square().sum(1)).min()) / rewards.shape[1]

    low, high = 0.0, 1e4 / max(float(rewards.std()), 1e-12)
    if kept(high) > _KEPT:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) > _KEPT else (low, middle)
    return high


def _resampled(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of the samples that are kept, in proportion to their weights, (prompts, n) into all of them."""
    prompts, n = weights.shape
    places = (torch.arange(n) + torch.rand(prompts, 1, generator=generator, dtype=torch.float64)) / n
    numbers = torch.searchsorted(weights.cumsum(1), places).clamp(max=n - 1)
    return numbers + n * torch.arange(prompts)[:, None]


def _uniform(said: Sequence[Sample], generator: torch.Generator) -> list[float]:
    numbers: list[float] = torch.rand(len(said), generator=generator, dtype=torch.float64).tolist()
    return numbers


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator))
