import math

import pytest
import torch

from lightning_dpo.evaluation import (
    best_at_kl,
    mixture_log_weights,
    reward_at_kl,
    reweighted_frontier,
    share_of_limit,
)

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


def test_where_nothing_is_left_to_gain_the_limit_is_known_at_every_larger_kl():
    # Of a judge that says yes or no: all mass on what it likes costs -log of its share.
    rewards = (torch.arange(1000) % 10 < 3).double()
    point = best_at_kl(rewards, kl=8.0)
    assert (point.reward, point.kl) == pytest.approx((1.0, -math.log(0.3)), abs=1e-9)
    assert point.effective_sample_size == pytest.approx(300)
    assert point.tells(8.0)
    few = best_at_kl(rewards[:10], kl=8.0)
    assert not few.tells(8.0)
    assert not best_at_kl(torch.linspace(0, 1, 1000), kl=1.0).tells(2.0)


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


def _exact(probabilities, rewards, beta):
    """Reward and KL of the optimum by enumeration."""
    best = (probabilities.log() + rewards / beta).softmax(0)
    return float(best @ rewards), float(best @ (best / probabilities).log())


def test_samples_of_two_policies_weigh_as_draws_from_their_mixture():
    # Each policy's samples have its own probabilities as their frequencies, so that the estimate is exact.
    reference = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    trained = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    drawn = torch.tensor([0, 0, 1, 2, 0, 1, 2, 2])
    outcomes = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    under = torch.stack([torch.zeros(8), (trained / reference).log()[drawn]])
    weights = mixture_log_weights(under)
    for beta in (0.3, 1.0, 4.0):
        (point,) = reweighted_frontier(outcomes[drawn], betas=[beta], log_weights=weights)
        assert (point.reward, point.kl) == pytest.approx(_exact(reference, outcomes, beta), abs=1e-12)


def test_the_mixture_reaches_kls_that_the_reference_alone_does_not():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(1000, generator=generator, dtype=torch.float64).mul(2).softmax(0)
    outcomes = torch.randn(1000, generator=generator, dtype=torch.float64)
    trained = (reference.log() + outcomes / 0.2).softmax(0)
    exact, kl = _exact(reference, outcomes, 0.2)
    drawn = torch.cat([torch.multinomial(p, 500, True, generator=generator) for p in (reference, trained)])
    under = torch.stack([torch.zeros(1000), (trained / reference).log()[drawn]])
    mixed = best_at_kl(outcomes[drawn], kl=kl, log_weights=mixture_log_weights(under))
    alone = best_at_kl(outcomes[drawn[:500]], kl=kl)
    assert mixed.reward == pytest.approx(exact, abs=0.05)
    assert mixed.effective_sample_size > 10 * alone.effective_sample_size


def test_a_curve_is_read_off_exactly_where_rewards_are_normal():
    # E[r] = s sqrt(2 KL) for r ~ N(0, s^2) under the reference: tilting shifts the mean by s^2 / beta.
    kls, s = [0.5, 3.0, 6.0], 1.7
    rewards = [s * math.sqrt(2 * kl) for kl in kls]
    for kl in (0.5, 1.0, 4.2, 6.0):
        assert reward_at_kl(kls[::-1], rewards[::-1], kl=kl) == pytest.approx(s * math.sqrt(2 * kl))


def test_a_curve_is_not_read_beyond_its_ends():
    assert math.isnan(reward_at_kl([1.0, 2.0], [1.0, 2.0], kl=2.1))
    assert math.isnan(reward_at_kl([1.0, 2.0], [1.0, 2.0], kl=0.9))
    assert math.isnan(reward_at_kl([1.0], [1.0], kl=1.0))
    assert reward_at_kl([1.0, 1.0], [2.0, 4.0], kl=1.0) == 3.0


def test_share_of_limit_does_not_change_when_rewards_are_shifted():
    assert share_of_limit(3.0, limit=5.0, reference=1.0) == 0.5
    assert share_of_limit(103.0, limit=105.0, reference=101.0) == 0.5
    assert math.isnan(share_of_limit(1.0, limit=1.0, reference=1.0))


def test_wrong_curves_and_mixtures_are_named():
    with pytest.raises(ValueError, match="`rewards`"):
        reward_at_kl([1.0], [1.0, 2.0], kl=1.0)
    with pytest.raises(ValueError, match="-1"):
        reward_at_kl([-1.0, 1.0], [1.0, 2.0], kl=1.0)
    with pytest.raises(ValueError, match="`logratios`"):
        mixture_log_weights(torch.zeros(3))
