"""Best-of-N against every way of drawing: rewards, policies, KLs and their errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from evaluation_models import completions, logp, tiny_llama

from lightning_dpo.evaluation import best_at_kl, best_of_n, best_of_n_kl_bound, best_of_n_policy

REFERENCE = [0.1, 0.4, 0.05, 0.25, 0.2]
SCORES = [0.3, -1.2, 2.0, 0.0, 1.1]
TIED = [1.0, 0.0, 2.0, 0.0, 1.0]


def enumerated(scores: list[float], n: int) -> torch.Tensor:
    """Draw every n-tuple of outcomes, keep the best, share a tie equally among the draws: the definition."""
    policy = torch.zeros(len(scores), dtype=torch.float64)
    for draw in itertools.product(range(len(scores)), repeat=n):
        best = max(scores[outcome] for outcome in draw)
        kept = [outcome for outcome in draw if scores[outcome] == best]
        for outcome in kept:
            policy[outcome] += math.prod(REFERENCE[each] for each in draw) / len(kept)
    return policy


def divergence(policy: torch.Tensor, reference: torch.Tensor) -> float:
    return float((policy * (policy / reference).log()).sum())


@pytest.mark.parametrize("scores", [SCORES, TIED], ids=["distinct", "tied"])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_policy_reward_and_kl_are_the_enumerated_ones(scores: list[float], n: int) -> None:
    reference = torch.tensor(REFERENCE, dtype=torch.float64)
    policy, found = best_of_n_policy(reference, scores=torch.tensor(scores), n=n)
    truth = enumerated(scores, n)
    torch.testing.assert_close(policy, truth, atol=1e-12, rtol=0)
    assert found.reward == pytest.approx(sum(p * s for p, s in zip(truth.tolist(), scores, strict=True)))
    assert found.kl == pytest.approx(divergence(truth, reference), abs=1e-12)
    assert found.kl <= found.kl_bound + 1e-12


def test_a_language_model_is_enumerated_too() -> None:
    model = tiny_llama(0)
    every = completions()
    reference = torch.tensor([logp(model, each) for each in every], dtype=torch.float64).exp()
    reference /= reference.sum()
    lengths = torch.tensor([float(len(each)) for each in every])  # three scores, so ties abound
    policy, found = best_of_n_policy(reference, scores=lengths, n=4)
    shares = [float(reference[lengths <= k].sum()) for k in range(4)]
    assert float(policy[lengths == 3].sum()) == pytest.approx(1 - shares[2] ** 4)
    assert found.kl == pytest.approx(divergence(policy, reference))
    drawn = reference.multinomial(4000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimate = best_of_n(lengths[drawn], 4)
    assert abs(estimate.reward - found.reward) < 4 * estimate.reward_error
    assert abs(estimate.kl - found.kl) < 4 * estimate.kl_error
    assert found.kl < 0.9 * found.kl_bound


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_the_reward_is_the_mean_over_all_subsets(n: int) -> None:
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    subsets = list(itertools.combinations(range(7), n))
    expected = sum(float(scores[:, list(s)].amax(-1).mean()) for s in subsets) / len(subsets)
    assert best_of_n(scores, n).reward == pytest.approx(expected, abs=1e-12)


def test_repeats_in_proportion_give_the_exact_kl() -> None:
    repeats = torch.tensor([round(40 * p) for p in REFERENCE])
    scores = torch.tensor(TIED).repeat_interleave(repeats)
    _, exact = best_of_n_policy(torch.tensor(REFERENCE), scores=torch.tensor(TIED), n=3)
    assert best_of_n(scores, 3).kl == pytest.approx(exact.kl, abs=1e-6)


def test_without_ties_the_kl_is_the_bound() -> None:
    result = best_of_n(torch.linspace(0, 1, 64), 8)
    assert result.kl == result.kl_bound == pytest.approx(math.log(8) - 7 / 8)
    assert result.kl_error == 0
    assert best_of_n_kl_bound(1) == 0


def test_all_scores_equal_move_nothing() -> None:
    result = best_of_n(torch.ones(2, 10), 5)
    assert result.reward == pytest.approx(1)
    assert result.reward_error == 0
    assert result.kl == pytest.approx(0, abs=1e-12)
    assert result.kl_error == pytest.approx(0, abs=1e-12)


def test_uniform_scores_have_a_closed_form() -> None:
    scores = torch.rand(4, 20_000, generator=torch.Generator().manual_seed(0))
    for n in (2, 16, 256):
        result = best_of_n(scores, n)
        assert abs(result.reward - n / (n + 1)) < 4 * result.reward_error


@pytest.mark.parametrize("n", [2, 8])
def test_errors_are_the_spread_over_repetitions(n: int) -> None:
    """Of scores half of which are rounded to whole numbers, so that both estimates vary."""
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(300, 3, 100, generator=generator, dtype=torch.float64)
    scores = torch.where(scores.abs() < 1, scores.round(), scores)
    results = [best_of_n(each, n) for each in scores]
    for name in ("reward", "kl"):
        spread = torch.tensor([getattr(result, name) for result in results]).std()
        error = torch.tensor([getattr(result, f"{name}_error") for result in results]).mean()
        assert float(error / spread) == pytest.approx(1, abs=0.15), name


def test_prompts_are_averaged() -> None:
    scores = torch.randn(2, 30, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    both, first, second = best_of_n(scores, 3), best_of_n(scores[0], 3), best_of_n(scores[1], 3)
    assert both.reward == pytest.approx((first.reward + second.reward) / 2)
    assert both.kl == pytest.approx((first.kl + second.kl) / 2)
    assert both.kl_error == pytest.approx(math.hypot(first.kl_error, second.kl_error) / 2)
    assert both.reward_error == pytest.approx(math.hypot(first.reward_error, second.reward_error) / 2)


def test_many_samples_and_a_large_n_stay_finite() -> None:
    scores = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    result = best_of_n(scores, 5000)
    assert result.reward == float(scores.max().double())
    assert all(math.isfinite(value) for value in (result.kl, result.kl_error, result.reward_error))
    assert 0 < result.kl < result.kl_bound
    assert math.isnan(best_of_n(torch.tensor([1.0]), 1).reward_error)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"`scores` must be \(prompts, samples\)"):
        best_of_n(torch.zeros(0), 1)
    with pytest.raises(ValueError, match="`scores` must be finite, got 1 that"):
        best_of_n(torch.tensor([1.0, math.nan]), 1)
    with pytest.raises(ValueError, match="`n` must be from 1 to the 2 samples of each prompt, got n=3"):
        best_of_n(torch.zeros(4, 2), 3)
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        best_of_n_kl_bound(0)
    with pytest.raises(ValueError, match="`probabilities` must be at least 0 and sum to 1"):
        best_of_n_policy(torch.tensor([0.5, 0.4]), scores=torch.zeros(2), n=2)
    with pytest.raises(ValueError, match="`probabilities` and `scores`"):
        best_of_n_policy(torch.tensor([0.5, 0.5]), scores=torch.zeros(3), n=2)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_no_best_of_n_is_above_the_limit_at_its_kl(n: int) -> None:
    """The limit is found from each element once, weighted as the reference weighs it."""
    _, found = best_of_n_policy(torch.tensor(REFERENCE), scores=torch.tensor(SCORES), n=n)
    log_weights = (5 * torch.tensor(REFERENCE, dtype=torch.float64)).log()
    limit = best_at_kl(torch.tensor(SCORES, dtype=torch.float64), kl=found.kl, log_weights=log_weights)
    assert limit.kl == pytest.approx(found.kl, abs=1e-4)
    assert 0.8 * limit.reward < found.reward < limit.reward + 1e-6


@pytest.mark.parametrize("n", [2, 7])
def test_equal_weights_are_samples_of_the_reference(n: int) -> None:
    scores = torch.randn(2, 400, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    plain, weighted = best_of_n(scores, n), best_of_n(scores, n, log_weights=torch.full_like(scores, -3.0))
    assert weighted.kl == pytest.approx(plain.kl)
    assert weighted.reward == pytest.approx(plain.reward, abs=0.2 * plain.reward_error)
    assert (weighted.reward_error, weighted.kl_error) == pytest.approx((plain.reward_error, plain.kl_error))
    assert weighted.effective_sample_size == pytest.approx(plain.effective_sample_size)


def test_weighted_samples_tell_an_n_that_was_never_drawn() -> None:
    """Of 8,000 draws of a normal distribution the best is 3.80 in the mean; the samples are 2,400."""
    n, each, centres = 8000, 800, torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    scores = torch.cat([c + torch.randn(each, generator=generator, dtype=torch.float64) for c in centres])
    ratios = centres[:, None] * scores - 0.5 * centres[:, None] ** 2  # log N(c, 1) - log N(0, 1)
    found = best_of_n(scores, n, log_weights=math.log(3) - ratios.logsumexp(0))
    grid = torch.linspace(-8, 10, 200_001, dtype=torch.float64)
    below = torch.special.ndtr(grid) ** n
    exact = float(grid[-1] - torch.trapezoid(below, grid))
    assert exact == pytest.approx(3.796, abs=0.001)
    assert abs(found.reward - exact) < 4 * found.reward_error
    assert found.reward_error < 0.02
    assert found.kl == pytest.approx(best_of_n_kl_bound(n))  # no two are equal
    assert 200 < found.effective_sample_size < each
    few = best_of_n(scores[:each], n, log_weights=torch.zeros(each))
    assert few.effective_sample_size < 2  # of the reference's own none is good enough


def test_weights_have_the_shape_of_the_scores() -> None:
    with pytest.raises(ValueError, match=r"`log_weights` must have the shape of `scores` \(2, 4\)"):
        best_of_n(torch.zeros(2, 4), 2, log_weights=torch.zeros(4))
