"""A policy fitted to the optimum of the KL-constrained objective: its samples tell what is reachable."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from lightning_dpo.scoring.forward import ScoringPlan, score
from lightning_dpo.scoring.select import select_plan
from lightning_dpo.types.checks import check_bounds

__all__ = ["FittedOptimum", "fit_optimum"]

_LARGEST_BETA = 1e6


@dataclass(frozen=True)
class FittedOptimum:
    """What a fit drew and found.

    Attributes:
        rounds: The optimum that each round fitted to, as the samples that it began from tell it.
        rewards: Of all samples, (prompts, samples): of each prompt first those of the reference, then as many
            of the policy after each round.
        log_weights: log reference - log of the equal mixture of the reference and these policies,
            (prompts, samples), nats; see `mixture_log_weights`.
        kl: KL(policy || reference) of the policy after the last round, from its own samples, nats.
        reward: Mean reward of these.
    """

    rounds: list[FrontierPoint]
    rewards: Tensor
    log_weights: Tensor
    kl: float
    reward: float


def fit_optimum(
    policy: nn.Module,
    *,
    reference: nn.Module,
    draw: Callable[[nn.Module, int], Sequence[Sample]],
    judge: Callable[[Sequence[Sample]], Tensor],
    prompts: int,
    kl: float,
    rounds: int = 6,
    most_rounds: int | None = None,
    lr: float = 1e-3,
    epochs: int = 1,
    batch_size: int = 64,
    effective_share: float = 0.08,
    seed: int = 0,
) -> FittedOptimum:
    """Bring a policy to pi* = pi_ref exp(r / beta) / Z, beta being that at which KL(pi* || pi_ref) is `kl`.

    Each round weighs all completions that were drawn so far by pi* over the mixture of what they were drawn
    from, maximises the weighted log-likelihood, and draws from the policy that comes of it. That lowers
    KL(pi* || pi), so that no mass of pi* is left out, as importance sampling needs of what it draws from
    (adaptive multiple importance sampling, https://arxiv.org/abs/0907.1254, with distributional policy
    gradients, https://arxiv.org/abs/2012.11635, as its adaptation). What an earlier policy found and a later
    one misses stays among the completions. Where few of them carry the weight, beta is raised for this round
    until enough do, so that a policy that begins as the reference gets there step by step. Where few carry it
    after the last round too, as when that has just found what all before had missed, `most_rounds` adds some.

    What is drawn is scored by all policies so far: a second copy of the policy lies on its device, and the
    weights of each round lie on the CPU.

    Args:
        policy: Is trained in place, from the reference's own weights, or from others that leave nothing of
            the reference out; a policy that DPO has moved far gives up too much of it.
        reference: pi_ref.
        draw: Completions of a policy with a seed, as many of each prompt, those of one prompt together.
        judge: r of completions, (samples,).
        prompts: How many different ones `draw` completes.
        kl: Where the optimum is wanted, nats, above 0.
        rounds: How often to fit and draw.
        most_rounds: How often to do so where 100 effective samples do not tell the optimum by then; None adds
            no round.
        lr: Of Adam.
        epochs: Passes over as many completions as are drawn at once, in each round.
        batch_size: Completions in a step.
        effective_share: How many samples of a prompt must at least carry a round's weight, as a part of those
            that are drawn of it at once.
        seed: Of the draws.

    Raises:
        ValueError: If an argument is out of its range, before anything is drawn.
    """
    check_bounds(above=0, kl=kl, lr=lr)
    check_bounds(least=1, prompts=prompts, rounds=rounds, epochs=epochs, batch_size=batch_size)
    learn = partial(
        _learn,
        policy,
        optimizer=torch.optim.Adam(policy.parameters(), lr=lr),
        plan=select_plan(policy, layout="concatenated").plan,
        batch_size=batch_size,
    )
    generator = torch.Generator().manual_seed(seed)
    said = partial(_logps, batch_size=4 * batch_size)

    earlier = copy.deepcopy(policy)
    states: list[dict[str, Tensor]] = []
    pool = list(draw(reference, seed))
    each = len(pool)
    by_prompt = partial(_by_prompt, prompts=prompts, each=each)
    enough = effective_share * each / prompts
    rewards = judge(pool).double()
    logps = said(reference, pool)[None]  # under each model, of all that was drawn, (models, samples)
    found: list[FrontierPoint] = []
    for number in range(1, max(rounds, most_rounds or 0) + 1):
        log_weights = mixture_log_weights(by_prompt(logps - logps[0]))
        if number > rounds and best_at_kl(by_prompt(rewards), kl=kl, log_weights=log_weights).tells(kl):
            break
        point = _attainable(by_prompt(rewards), log_weights, kl=kl, enough=enough)
        found.append(point)
        weights = (by_prompt(rewards) / point.beta + log_weights).softmax(-1).flatten()
        order = by_prompt(torch.arange(len(pool))).flatten().tolist()
        picked = torch.multinomial(weights, epochs * each, replacement=True, generator=generator)
        learn([pool[order[index]] for index in picked.tolist()])
        drawn = list(draw(policy, seed + number))
        pool += drawn
        rewards = torch.cat([rewards, judge(drawn).double()])
        of_drawn = [said(reference, drawn)]
        for state in states:
            earlier.load_state_dict(state)
            of_drawn.append(said(earlier, drawn))
        logps = torch.cat([torch.cat([logps, torch.stack(of_drawn)], dim=1), said(policy, pool)[None]])
        states.append({name: value.to("cpu", copy=True) for name, value in policy.state_dict().items()})
    own = logps[-1, -each:] - logps[0, -each:]
    return FittedOptimum(
        rounds=found,
        rewards=by_prompt(rewards),
        log_weights=mixture_log_weights(by_prompt(logps - logps[0])),
        kl=float(own.mean()),
        reward=float(rewards[-each:].mean()),
    )


def _learn(
    policy: nn.Module,
    samples: Sequence[Sample],
    *,
    optimizer: torch.optim.Optimizer,
    plan: ScoringPlan,
    batch_size: int,
) -> None:
    """Maximise the likelihood of samples, each taken once."""
    device = next(policy.parameters()).device
    policy.eval()  # without dropout; gradients flow all the same
    for first in range(0, len(samples), batch_size):
        optimizer.zero_grad()
        batch = completion_batch(samples[first : first + batch_size]).to(device)
        loss = -score(policy, batch, plan=plan).logps.mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()


def _logps(model: nn.Module, samples: Sequence[Sample], *, batch_size: int) -> Tensor:
    return sample_logps(model, samples=samples, batch_size=batch_size).double()


def _by_prompt(values: Tensor, *, prompts: int, each: int) -> Tensor:
    """Values of draws of `each` samples, laid end to end, (..., samples), as (..., prompts, samples)."""
    draws = values.view(*values.shape[:-1], -1, prompts, each // prompts)
    return draws.transpose(-3, -2).flatten(-2)


def _attainable(rewards: Tensor, log_weights: Tensor, *, kl: float, enough: float) -> FrontierPoint:
    """The optimum at a KL, or at the next larger beta at which enough samples carry the weight."""
    point = best_at_kl(rewards, kl=kl, log_weights=log_weights)
    while point.effective_sample_size < enough and point.beta < _LARGEST_BETA:
        (point,) = reweighted_frontier(rewards, betas=[1.1 * point.beta], log_weights=log_weights)
    return point
