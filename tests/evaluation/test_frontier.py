import math

import pytest
import torch

from lightning_dpo.evaluation import best_at_kl, reweighted_frontier

REWARDS = [0.3, -1.2, 2.0, 0.0, 1.1]
REFERENCE = [0.1, 0.4, 0.05, 0.25, 0.2]


def optimum(beta):
    """pi* = pi_ref exp(r / beta) / Z over a finite set, by hand."""
    mass = [p * math.exp(r / beta) for p, r in zip(REFERENCE, REWARDS, strict=True)]
    policy = [m / sum(mass) for m in mass]
    reward = sum(p * r for p, r in zip(policy, REWARDS, strict=True))
    return reward, sum(p * math.log(p / q) for p, q in zip(policy, REFERENCE, strict=True))


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0, 50.0])
def test_repeats_in_proportion_give_the_enumerated_optimum(beta):
    repeats = torch.tensor([round(20 * p) for p in REFERENCE])
    rewards = torch.tensor(REWARDS, dtype=torch.float64).repeat_interleave(repeats)
    (point,) = reweighted_frontier(rewards, betas=[beta])
    assert (point.reward, point.kl) == pytest.approx(optimum(beta), abs=1e-12)
    assert point.beta == beta


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_samples_of_another_distribution_give_it_too(beta):
    # Each element once: draws of the uniform distribution.
    log_weights = torch.tensor(REFERENCE, dtype=torch.float64).log() - math.log(1 / 5)
    (point,) = reweighted_frontier(
        torch.tensor(REWARDS, dtype=torch.float64), betas=[beta], log_weights=log_weights
    )
    assert (point.reward, point.kl) == pytest.approx(optimum(beta), abs=1e-12)


@pytest.mark.parametrize("beta", [0.8, 1.0, 2.0])
def test_gaussian_rewards_have_a_closed_form(beta):
    # r ~ N(m, s^2) under pi_ref: pi* shifts the mean by s^2 / beta, at KL s^2 / (2 beta^2).
    quantiles = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    rewards = 3 + 0.7 * torch.special.ndtri(quantiles)
    (point,) = reweighted_frontier(rewards, betas=[beta])
    assert point.reward == pytest.approx(3 + 0.49 / beta, abs=1e-3)
    assert point.kl == pytest.approx(0.49 / (2 * beta**2), abs=1e-3)


def test_effective_samples_and_the_mark():
    flat, steep = reweighted_frontier(torch.linspace(0, 1, 400), betas=[1e4, 1e-3])
    assert flat.effective_sample_size == pytest.approx(400, rel=1e-3)
    assert flat.is_reliable
    assert steep.effective_sample_size < 2
    assert not steep.is_reliable


def test_prompts_are_normalised_apart():
    rewards = torch.tensor([[0.0, 1.0, 2.0, 5.0], [3.0, -1.0, 0.5, 0.5]])
    (both,) = reweighted_frontier(rewards, betas=[0.7])
    first, second = (reweighted_frontier(row, betas=[0.7])[0] for row in rewards)
    assert both.reward == pytest.approx((first.reward + second.reward) / 2)
    assert both.kl == pytest.approx((first.kl + second.kl) / 2)
    assert both.effective_sample_size == min(first.effective_sample_size, second.effective_sample_size)
    shifted = reweighted_frontier(rewards + torch.tensor([[10.0], [-10.0]]), betas=[0.7])[0]
    assert shifted.kl == pytest.approx(both.kl)


def test_best_at_kl_inverts_the_frontier():
    rewards = torch.randn(500, generator=torch.Generator().manual_seed(0))
    for point in reweighted_frontier(rewards, betas=[0.4, 1.0, 5.0]):
        found = best_at_kl(rewards, kl=point.kl)
        assert found.beta == pytest.approx(point.beta, rel=1e-4)
        assert found.reward == pytest.approx(point.reward, rel=1e-6)


def test_no_reweighting_of_the_samples_has_more_reward_at_its_kl():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(50, generator=generator, dtype=torch.float64)
    for sharpness in (0.2, 0.5, 1.0):
        other = (rewards * sharpness + torch.randn(50, generator=generator)).softmax(0)
        kl = float((other * (other * 50).log()).sum())
        assert best_at_kl(rewards, kl=kl).reward >= float((other * rewards).sum())


def test_a_kl_beyond_the_samples_is_not_claimed():
    point = best_at_kl(torch.linspace(0, 1, 20), kl=10.0)
    assert point.kl == pytest.approx(math.log(20))
    assert not point.is_reliable


def test_wrong_arguments_are_named():
    rewards = torch.zeros(3)
    with pytest.raises(ValueError, match="`betas`"):
        reweighted_frontier(rewards, betas=[1.0, 0.0])
    with pytest.raises(ValueError, match="`rewards`"):
        reweighted_frontier(torch.zeros(0), betas=[1.0])
    with pytest.raises(ValueError, match="`log_weights`"):
        reweighted_frontier(rewards, betas=[1.0], log_weights=torch.zeros(2))
    with pytest.raises(ValueError, match="`kl`"):
        best_at_kl(rewards, kl=0.0)
