"""A policy fitted to the optimum of the KL-constrained objective: its samples tell what is reachable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_dpo.evaluation.frontier import best_at_kl, mixture_log_weights, reweighted_frontier
from lightning_dpo.evaluation.kl import completion_batch, sample_logps
from lightning_dpo.evaluation.sampling import Sample
from lightning_dpo.scoring.forward import score
from lightning_dpo.scoring.select import select_plan

__all__ = ["FitRound", "fit_optimum"]


@dataclass(frozen=True, slots=True)
class FitRound:
    """What one round of `fit_optimum` began from.

    Attributes:
        beta: Of the optimum that it was fitted to.
        kl: KL of that optimum from the reference, estimated from this round's samples, nats.
        effective_sample_size: Of these samples under that optimum's weights, of the worst prompt.
    """

    beta: float
    kl: float
    effective_sample_size: float


def fit_optimum(
    policy: nn.Module,
    *,
    reference: nn.Module,
    draw: Callable[[nn.Module, int], Sequence[Sample]],
    judge: Callable[[Sequence[Sample]], Tensor],
    prompts: int,
    kl: float,
    rounds: int = 5,
    lr: float = 1e-3,
    epochs: int = 2,
    batch_size: int = 64,
    effective_share: float = 0.04,
    seed: int = 0,
) -> list[FitRound]:
    """Bring a policy to pi* = pi_ref exp(r / beta) / Z, beta being that at which KL(pi* || pi_ref) is `kl`.

    Each round draws completions from the policy, weighs them and some of the reference's by pi* over what
    they were drawn from, and maximises the weighted log-likelihood. That lowers KL(pi* || pi), so that no
    mass of pi* is left out, as importance sampling needs of what it draws from (distributional policy
    gradients, https://arxiv.org/abs/2012.11635, here off policy within a round). Where few samples carry the
    weight, beta is raised for this round until enough do, so that a policy that begins as the reference gets
    there step by step.

    Args:
        policy: Is trained in place, from the reference's own weights, or from others that leave nothing of
            the reference out; a policy that DPO has moved far gives up too much of it.
        reference: pi_ref.
        draw: Completions of a policy with a seed, as many of each prompt, those of one prompt together.
        judge: r of completions, (samples,).
        prompts: How many different ones `draw` completes.
        kl: Where the optimum is wanted, nats, above 0.
        rounds: How often to draw and fit.
        lr: Of Adam.
        epochs: Passes over as many completions as the policy drew, in each round.
        batch_size: Completions in a step.
        effective_share: Part of a prompt's samples that a round's beta must keep effective.
        seed: Of the draws.

    Returns:
        What each round began from.

    Raises:
        ValueError: If `kl` is not above 0.
    """
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    plan = select_plan(policy, layout="concatenated").plan
    device = next(policy.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    known = list(draw(reference, seed))
    found: list[FitRound] = []
    for number in range(1, rounds + 1):
        # With samples of the reference among them the weights tell Z, which those of the policy alone do not.
        pool = [*known, *draw(policy, seed + number)]
        by_prompt = partial(_by_prompt, prompts=prompts)
        rewards = by_prompt(judge(pool).double())
        own, others = (sample_logps(m, samples=pool, batch_size=4 * batch_size) for m in (policy, reference))
        ratios = by_prompt((own - others).double())
        log_weights = mixture_log_weights(torch.stack([torch.zeros_like(ratios), ratios]))
        beta = _attainable(rewards, log_weights, kl=kl, share=effective_share)
        (point,) = reweighted_frontier(rewards, betas=[beta], log_weights=log_weights)
        found.append(FitRound(beta, point.kl, point.effective_sample_size))
        weights = (rewards / beta + log_weights).softmax(-1)
        order = by_prompt(torch.arange(len(pool))).flatten().tolist()
        policy.train()
        count = epochs * len(pool) // 2
        drawn = torch.multinomial(weights.flatten(), count, replacement=True, generator=generator)
        for batch in torch.split(drawn, batch_size):
            optimizer.zero_grad()
            scored = completion_batch([pool[order[index]] for index in batch.tolist()]).to(device)
            loss = -score(policy, scored, plan=plan).logps.mean()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
    policy.eval()
    return found


def _by_prompt(values: Tensor, *, prompts: int) -> Tensor:
    """Values of the reference's samples and then of the policy's as (prompts, samples of both)."""
    return torch.cat(list(values.view(2, prompts, -1)), dim=1)


def _attainable(rewards: Tensor, log_weights: Tensor, *, kl: float, share: float) -> float:
    """The beta of the optimum at a KL, or the next larger one at which enough samples carry the weight."""
    beta = best_at_kl(rewards, kl=kl, log_weights=log_weights).beta
    wanted = share * rewards.shape[1]
    while math.isfinite(beta):
        (point,) = reweighted_frontier(rewards, betas=[beta], log_weights=log_weights)
        if point.effective_sample_size >= wanted or beta > 1e6:
            break
        beta *= 1.1
    return beta
