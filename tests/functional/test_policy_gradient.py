"""The mathematics of PPO against sums done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor

from lightning_dpo.functional import (
    adapted_kl_coefficient,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    k3_kl,
    kl_penalised_rewards,
    token_advantages,
    whiten,
)


def test_every_token_bears_its_log_ratio_and_the_last_one_the_score() -> None:
    logratio = tensor([[0.1, -0.2, 0.4], [0.3, 0.0, 0.0]])
    scores = tensor([2.0, -1.0])
    rewards = kl_penalised_rewards(logratio, scores=scores, lengths=tensor([3, 1]), coefficient=0.5)
    torch.testing.assert_close(rewards, tensor([[-0.05, 0.1, 1.8], [-1.15, 0.0, 0.0]]))
    # Together: r - beta log (pi / pi_ref) of the completion, Eq. 3 of 2305.18290.
    torch.testing.assert_close(rewards.sum(1), scores - 0.5 * logratio.sum(1))


def test_advantages_by_hand() -> None:
    rewards = tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])
    values = tensor([[0.5, 1.0, 1.5], [2.0, 0.0, 0.0]])
    advantages = gae(rewards, values=values, gamma=0.9, gae_lambda=0.5)
    # delta_2 = 2 - 1.5, delta_1 = 0 + 0.9 * 1.5 - 1, delta_0 = 1 + 0.9 * 1 - 0.5
    last = 0.5
    second = 0.35 + 0.45 * last
    first = 1.4 + 0.45 * second
    torch.testing.assert_close(advantages, tensor([[first, second, last], [1.0, 0.0, 0.0]]))


def test_the_ends_of_lambda() -> None:
    rewards, values = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    monte_carlo = gae(rewards, values=values, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(monte_carlo + values, rewards.flip(1).cumsum(1).flip(1))
    following = torch.cat([values[:, 1:], torch.zeros(4, 1)], dim=1)
    one_step = gae(rewards, values=values, gamma=0.7, gae_lambda=0.0)
    torch.testing.assert_close(one_step, rewards + 0.7 * following - values)


def test_padding_changes_nothing() -> None:
    rewards, values = torch.randn(1, 4), torch.randn(1, 4)
    padded = gae(
        torch.nn.functional.pad(rewards, (0, 3)),
        values=torch.nn.functional.pad(values, (0, 3)),
        gamma=0.9,
        gae_lambda=0.8,
    )
    torch.testing.assert_close(padded[:, :4], gae(rewards, values=values, gamma=0.9, gae_lambda=0.8))
    assert not padded[:, 4:].any()


def test_advantages_of_completions_that_lie_end_to_end() -> None:
    logratio, values = tensor([0.1, -0.2, 0.4, 0.3]), tensor([0.5, 1.0, 1.5, 2.0])
    scores, lengths = tensor([2.0, -1.0]), tensor([3, 1])
    discounts = {"gamma": 0.9, "gae_lambda": 0.5}
    found = token_advantages(
        logratio, values=values, scores=scores, lengths=lengths, coefficient=0.5, **discounts
    )
    rewards = kl_penalised_rewards(
        logratio[None, :3], scores=scores[:1], lengths=lengths[:1], coefficient=0.5
    )
    first = gae(rewards, values=values[None, :3], **discounts)[0]
    torch.testing.assert_close(found, torch.cat([first, tensor([-1.0 - 0.5 * 0.3 - 2.0])]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "gradient"),
    [
        (1.1, 2.0, -2.2, False, -2.2),  # within the range: the ratio's gradient is the ratio itself
        (1.5, 2.0, -2.4, True, 0.0),  # too far up already: no more of it
        (0.5, 2.0, -1.0, False, -1.0),  # down by mistake: may come back
        (0.5, -2.0, 1.6, True, 0.0),  # too far down already
        (1.5, -2.0, 3.0, False, 3.0),  # up by mistake: may come back
    ],
)
def test_the_clipped_objective(
    ratio: float, advantage: float, loss: float, clipped: bool, gradient: float
) -> None:
    old = tensor([-1.0])
    logps = (old + math.log(ratio)).requires_grad_()
    found = clipped_policy_loss(logps, old_logps=old, advantages=tensor([advantage]), clip_range=0.2)
    torch.testing.assert_close(found.losses, tensor([loss]))
    assert found.clipped.tolist() == [clipped]
    found.losses.sum().backward()
    assert logps.grad is not None
    assert float(logps.grad) == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "loss", "clipped"),
    [
        (1.1, 0.405, False),  # (1.1 - 2)^2 / 2
        (1.9, 0.32, True),  # held at 1.2: (1.2 - 2)^2 / 2
        (0.5, 1.125, False),  # away from the return: the larger error counts
    ],
)
def test_the_clipped_value_loss(value: float, loss: float, clipped: bool) -> None:
    found = clipped_value_loss(
        tensor([value]), old_values=tensor([1.0]), returns=tensor([2.0]), clip_range=0.2
    )
    torch.testing.assert_close(found.losses, tensor([loss]))
    assert found.clipped.tolist() == [clipped]


@pytest.mark.parametrize(
    ("kl", "expected"), [(6.0, 0.5), (6.6, 0.505), (60.0, 0.51), (0.0, 0.49), (5.4, 0.495)]
)
def test_the_coefficient_follows_the_kl(kl: float, expected: float) -> None:
    assert adapted_kl_coefficient(0.5, kl=kl, target=6.0, gain=0.1) == pytest.approx(expected)


def _distribution(seed: int) -> Tensor:
    return torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(0)


def test_k3_is_unbiased_and_never_negative() -> None:
    p, q = _distribution(0), _distribution(1)
    terms = k3_kl(p.log() - q.log())
    assert (terms >= 0).all()
    torch.testing.assert_close((p * terms).sum(), (p * (p.log() - q.log())).sum())


def test_whitened_values_have_mean_0_and_variance_1() -> None:
    values = torch.randn(1000, dtype=torch.float64) * 3 + 5
    white = whiten(values, mean=values.mean(), variance=values.var(correction=0))
    assert float(white.mean()) == pytest.approx(0, abs=1e-9)
    assert float(white.var(correction=0)) == pytest.approx(1, abs=1e-6)
    assert not whiten(torch.ones(3), mean=tensor(1.0), variance=tensor(0.0)).any()
