"""The limit and best-of-N from a language model's samples, against everything that it can say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import pytest
import torch
from evaluation_models import EOS, MAX_NEW, PROMPT, completions, logp, tiny_llama
from torch import Tensor, nn

from lightning_dpo.evaluation import (
    Sample,
    best_at_kl,
    best_of_n,
    best_of_n_policy,
    fit_optimum,
    mixture_log_weights,
    reweighted_frontier,
    sample_completions,
    sample_logps,
)

EVERY = completions()
REWARDS = torch.randn(len(EVERY), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NUMBER = {tuple(each): index for index, each in enumerate(EVERY)}


def table(model: nn.Module) -> Tensor:
    """log pi of everything that can be said, (completions,)."""
    return torch.tensor([logp(model, each) for each in EVERY], dtype=torch.float64)


def said_by(model: nn.Module, count: int = 4000, seed: int = 0) -> list[Sample]:
    return sample_completions(
        model, prompts=[PROMPT] * count, eos_token_id=EOS, max_new_tokens=MAX_NEW, seed=seed, batch_size=1000
    )


def numbers_of(samples: list[Sample]) -> Tensor:
    return torch.tensor([NUMBER[tuple(each.completion_ids)] for each in samples])


def drawn(model: nn.Module) -> Tensor:
    """Numbers of sampled completions, (count,)."""
    return numbers_of(said_by(model))


def beside(seed: int = 1, spread: float = 0.2) -> nn.Module:
    """A policy near the reference."""
    policy = tiny_llama(0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        policy.lm_head.weight += spread * torch.randn(policy.lm_head.weight.shape, generator=generator)
    return policy


def optimum(log_reference: Tensor, beta: float) -> tuple[float, float]:
    """Reward and KL of pi_ref exp(r / beta) / Z, by the definition."""
    log_policy = (log_reference + REWARDS / beta).log_softmax(0)
    policy = log_policy.exp()
    return float((policy * REWARDS).sum()), float((policy * (log_policy - log_reference)).sum())


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_the_limit_is_found_from_samples_of_the_reference(beta: float) -> None:
    reference = tiny_llama(0)
    reward, kl = optimum(table(reference), beta)
    (point,) = reweighted_frontier(REWARDS[drawn(reference)], betas=[beta])
    spread = 1 / math.sqrt(point.effective_sample_size)
    assert point.reward == pytest.approx(reward, abs=4 * spread)
    assert point.kl == pytest.approx(kl, abs=4 * spread)
    assert point.is_reliable


def test_the_limit_is_found_from_samples_of_another_model() -> None:
    reference, policy = tiny_llama(0), beside()
    logs, others = table(reference), table(policy)
    reward, kl = optimum(logs, 0.7)
    said = drawn(policy)
    (point,) = reweighted_frontier(REWARDS[said], betas=[0.7], log_weights=(logs - others)[said])
    spread = 1 / math.sqrt(point.effective_sample_size)
    assert point.is_reliable
    assert point.reward == pytest.approx(reward, abs=4 * spread)
    assert point.kl == pytest.approx(kl, abs=4 * spread)


@pytest.mark.parametrize("beta", [0.4, 0.7, 2.0])
def test_the_limit_is_found_from_a_mixture_that_each_model_has_scored(beta: float) -> None:
    models = [tiny_llama(0), beside(1, 0.4), beside(2, 0.4)]
    pool = [sample for model in models for sample in said_by(model, 1500)]
    said = numbers_of(pool)
    logps = torch.stack([sample_logps(model, samples=pool, batch_size=700) for model in models])
    torch.testing.assert_close(logps[1], table(models[1])[said].float(), atol=1e-4, rtol=0)
    reward, kl = optimum(table(models[0]), beta)
    weights = mixture_log_weights(logps - logps[0])
    (point,) = reweighted_frontier(REWARDS[said], betas=[beta], log_weights=weights)
    spread = 1 / math.sqrt(point.effective_sample_size)
    assert point.is_reliable
    assert point.reward == pytest.approx(reward, abs=4 * spread)
    assert point.kl == pytest.approx(kl, abs=4 * spread)


@pytest.mark.parametrize("kl", [0.8, 1.5])
def test_a_policy_is_fitted_to_the_optimum_step_by_step(kl: float) -> None:
    reference, policy = tiny_llama(0), tiny_llama(0)
    judged = []

    def judge(samples: Sequence[Sample]) -> Tensor:
        judged.append(len(samples))
        return REWARDS[numbers_of(list(samples))]

    found = fit_optimum(
        policy,
        reference=reference,
        draw=lambda model, seed: said_by(model, 400, seed=seed),
        judge=judge,
        prompts=1,
        kl=kl,
        rounds=4,
        lr=1e-2,
        epochs=8,
        effective_share=0.6,
    )
    assert all(point.effective_sample_size >= 0.29 * 800 for point in found.rounds)
    logs = table(reference)
    log_optimum = (logs + REWARDS / found.rounds[-1].beta).log_softmax(0)
    best, fitted = log_optimum.exp(), table(policy).log_softmax(0)
    assert float((best * (log_optimum - logs)).sum()) == pytest.approx(kl, rel=0.15)
    assert float((best * (log_optimum - fitted)).sum()) < 0.2 * kl  # from the reference it is KL itself
    assert not policy.training
    assert judged == [400] * 5  # each sample once: those of the reference, and those of each round
    # What was drawn on the way tells the optimum at every KL, and what the policy has come to.
    for beta in (0.5, 1.0, 3.0):
        reward, away = optimum(logs, beta)
        (point,) = reweighted_frontier(found.rewards, betas=[beta], log_weights=found.log_weights)
        assert found.rewards.shape == (1, 5 * 400)
        assert point.effective_sample_size > 800
        assert (point.reward, point.kl) == pytest.approx((reward, away), abs=4 / 800**0.5)
    assert found.kl == pytest.approx(float((fitted.exp() * (fitted - logs)).sum()), abs=0.2)
    assert found.reward == pytest.approx(float((fitted.exp() * REWARDS).sum()), abs=0.2)


def test_a_fit_keeps_the_samples_of_each_prompt_together() -> None:
    """What is judged higher at the second prompt alone stays there, through all draws."""

    def judge(samples: Sequence[Sample]) -> Tensor:
        offset = torch.arange(len(samples)) // (len(samples) // 2)  # the first prompt's samples come first
        return 1000.0 * offset + torch.arange(len(samples))

    found = fit_optimum(
        tiny_llama(0),
        reference=tiny_llama(0),
        draw=lambda model, seed: said_by(model, 60, seed=seed),
        judge=judge,
        prompts=2,
        kl=0.5,
        rounds=2,
    )
    first, second = torch.arange(30.0).double(), torch.arange(1030.0, 1060.0).double()
    assert torch.equal(found.rewards, torch.stack([first.repeat(3), second.repeat(3)]))
    assert found.log_weights.shape == (2, 90)


@pytest.mark.parametrize(("each", "expected"), [(20, 5), (400, 2)])
def test_rounds_are_added_until_the_samples_tell_the_optimum(each: int, expected: int) -> None:
    found = fit_optimum(
        tiny_llama(0),
        reference=tiny_llama(0),
        draw=lambda model, seed: said_by(model, each, seed=seed),
        judge=lambda samples: REWARDS[numbers_of(list(samples))],
        prompts=1,
        kl=0.5,
        rounds=2,
        most_rounds=5,
    )
    assert len(found.rounds) == expected
    assert found.rewards.shape == (1, (1 + expected) * each)
    best = best_at_kl(found.rewards, kl=0.5, log_weights=found.log_weights)
    assert best.tells(0.5) == (each == 400)  # of 120 samples in all no 100 are effective


def test_the_fit_is_made_without_dropout() -> None:
    policy = tiny_llama(0)
    while_fitting: list[bool] = []
    policy.register_forward_pre_hook(lambda model, _: while_fitting.append(model.training))
    fit_optimum(
        policy.train(),
        reference=tiny_llama(0),
        draw=lambda model, seed: said_by(model, 100, seed=seed),
        judge=lambda samples: REWARDS[numbers_of(list(samples))],
        prompts=1,
        kl=0.5,
        rounds=1,
    )
    assert while_fitting
    assert not any(while_fitting)


@pytest.mark.parametrize("wrong", [{"kl": 0.0}, {"lr": 0.0}, {"rounds": 0}, {"prompts": 0}])
def test_mistakes_are_told_before_anything_is_drawn(wrong: dict[str, float]) -> None:
    def nothing(*_: object) -> NoReturn:
        raise AssertionError("drawn")

    given: Any = {"prompts": 1, "kl": 1.0, "draw": nothing, "judge": nothing, **wrong}
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
        fit_optimum(tiny_llama(0), reference=tiny_llama(0), **given)


@pytest.mark.parametrize("n", [2, 8])
def test_best_of_n_is_found_from_samples(n: int) -> None:
    reference = tiny_llama(0)
    probabilities = table(reference).softmax(0)
    _, exact = best_of_n_policy(probabilities, scores=REWARDS, n=n)
    found = best_of_n(REWARDS[drawn(reference)], n)
    assert abs(found.reward - exact.reward) < 4 * found.reward_error
    assert abs(found.kl - exact.kl) < 4 * found.kl_error
    assert exact.kl < exact.kl_bound


@pytest.mark.parametrize("n", [2, 8, 500])
def test_best_of_n_is_found_from_samples_of_other_models(n: int) -> None:
    reference, policy = tiny_llama(0), beside()
    logs = table(reference)
    said = torch.cat([drawn(reference), drawn(policy)])
    ratios = (table(policy) - logs)[said]
    weights = mixture_log_weights(torch.stack([torch.zeros_like(ratios), ratios]))
    _, exact = best_of_n_policy(logs.softmax(0), scores=REWARDS, n=n)
    found = best_of_n(REWARDS[said], n, log_weights=weights)
    assert abs(found.reward - exact.reward) < 4 * found.reward_error
    assert abs(found.kl - exact.kl) < 4 * found.kl_error
    assert 0 < found.reward_error < 0.1
