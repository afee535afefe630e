"""A policy fitted to the optimum of the KL-constrained objective: its samples tell what is reachable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_dpo.evaluation.frontier import (
    FrontierPoint,
    best_at_kl,
    mixture_log_weights,
    reweighted_frontier,
)
from lightning_dpo.evaluation.kl import completion_batch, sample_logps
from lightning_dpo.evaluation.sampling import Sample
from lightning_dpo.scoring.forward import score
from lightning_dpo.scoring.select import select_plan
from lightning_dpo.types.checks import check_bounds

__all__ = ["fit_optimum"]

_LARGEST_BETA = 1e6


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
) -> list[FrontierPoint]:
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
        The optimum that each round fits to, as the samples that it begins from tell it.

    Raises:
        ValueError: If an argument is out of its range, before anything is drawn.
    """
    check_bounds(above=0, kl=kl, lr=lr)
    check_bounds(least=1, prompts=prompts, rounds=rounds, epochs=epochs, batch_size=batch_size)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    plan = select_plan(policy, layout="concatenated").plan
    device = next(policy.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    by_prompt = partial(_by_prompt, prompts=prompts)
    logps_of = partial(sample_logps, batch_size=4 * batch_size)

    def measured(samples: Sequence[Sample]) -> Tensor:
        """Rewards and log-probabilities under the reference, (2, samples)."""
        return torch.stack([judge(samples).double(), logps_of(reference, samples=samples).double()])

    known = list(draw(reference, seed))
    of_known = measured(known)
    found: list[FrontierPoint] = []
    for number in range(1, rounds + 1):
        # With samples of the reference among them the weights tell Z, which those of the policy alone do not.
        drawn = list(draw(policy, seed + number))
        pool = [*known, *drawn]
        rewards, reference_logps = torch.cat([of_known, measured(drawn)], dim=1)
        ratios = by_prompt(logps_of(policy, samples=pool).double() - reference_logps)
        log_weights = mixture_log_weights(torch.stack([torch.zeros_like(ratios), ratios]))
        point = _attainable(by_prompt(rewards), log_weights, kl=kl, share=effective_share)
        found.append(point)
        weights = (by_prompt(rewards) / point.beta + log_weights).softmax(-1).flatten()
        order = by_prompt(torch.arange(len(pool))).flatten().tolist()
        policy.train()
        picked = torch.multinomial(weights, epochs * len(drawn), replacement=True, generator=generator)
        for batch in torch.split(picked, batch_size):
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


def _attainable(rewards: Tensor, log_weights: Tensor, *, kl: float, share: float) -> FrontierPoint:
    """The optimum at a KL, or at the next larger beta at which enough samples carry the weight."""
    point = best_at_kl(rewards, kl=kl, log_weights=log_weights)
    while point.effective_sample_size < share * rewards.shape[1] and point.beta < _LARGEST_BETA:
        (point,) = reweighted_frontier(rewards, betas=[1.1 * point.beta], log_weights=log_weights)
    return point
