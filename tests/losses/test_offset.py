"""Losses that ask each pair for a margin of its own, and margins that are clipped."""

from decimal import Decimal

import pytest
import torch

from lightning_dpo import losses as L
from lightning_dpo.types import PairLogps

# log-ratios of the chosen and of the rejected completion, and the pair's margin
PAIRS = [(2.75, -3.375, 0.25), (-2.25, 1.25, 4.0), (0.0, 0.0, 1.0), (-11.5, 6.75, 0.0), (10.5, -5.25, 12.5)]


def policy_and_reference(pairs=PAIRS, dtype=torch.float64):
    chosen, rejected, margins = (torch.tensor(column, dtype=dtype) for column in zip(*pairs, strict=True))
    ones, zeros = torch.ones(len(pairs)), torch.zeros(len(pairs), dtype=dtype)
    policy = PairLogps(chosen.requires_grad_(), rejected.requires_grad_(), ones, ones, margins=margins)
    return policy, PairLogps(zeros, zeros, ones, ones)


def D(x):
    return Decimal(x)


@pytest.mark.parametrize(
    ("scale", "offset"),
    [("log", lambda margin: D(0.5) * D(margin).ln()), ("linear", lambda margin: D(0.5) * D(margin))],
)
def test_odpo_asks_for_an_offset_of_each_pair(scale, offset):
    measured = L.ODPOLoss(0.3, offset_weight=0.5, offset_scale=scale)(*policy_and_reference())
    formulas = []
    for chosen, rejected, margin in PAIRS:
        logit = D(0.3) * (D(chosen) - D(rejected)) - (offset(margin) if margin or scale == "linear" else 0)
        nothing_asked = scale == "log" and margin == 0
        formulas.append(0.0 if nothing_asked else float((1 + (-logit).exp()).ln()))
    expected_losses = torch.tensor(formulas, dtype=torch.float64)
    torch.testing.assert_close(measured, expected_losses, rtol=1e-12, atol=1e-12)


def test_a_margin_of_0_takes_a_pair_out_of_odpo_and_leaves_plain_dpo():
    policy, reference = policy_and_reference(PAIRS[3:4], dtype=torch.float32)
    policy = policy._replace(margins=torch.zeros(1))
    loss = L.ODPOLoss(0.3, offset_weight=0.01)(policy, reference)
    loss.sum().backward()
    assert (loss.item(), policy.chosen.grad.item()) == (0.0, 0.0)
    plain = L.ODPOLoss(0.3, offset_weight=0.0)(policy, reference)
    torch.testing.assert_close(plain, L.DPOLoss(0.3)(policy, reference), rtol=0, atol=0)


def test_odpo_says_what_it_misses():
    policy, reference = policy_and_reference()
    with pytest.raises(ValueError, match=r"`policy` must hold `margins` for ODPOLoss, got None; .*`margin`"):
        L.ODPOLoss()(policy._replace(margins=None), reference)


def test_r_dpo_puts_a_preference_down_to_length_first():
    ratios = torch.zeros(3)
    lengths = torch.tensor([30, 10, 10]), torch.tensor([10, 10, 30])
    policy = PairLogps(ratios.clone().requires_grad_(), ratios, *lengths)
    L.RDPOLoss(0.3, length_penalty=0.1)(policy, PairLogps(ratios, ratios, *lengths)).sum().backward()
    assert policy.chosen.grad[0] > policy.chosen.grad[1] > policy.chosen.grad[2]


def test_a_clipped_pair_teaches_nothing_further():
    policy, reference = policy_and_reference()
    L.DPOLoss(0.3, max_reward=0.5)(policy, reference).sum().backward()
    delta = policy.chosen - reference.chosen - policy.rejected + reference.rejected
    beyond = 0.3 * delta.detach().abs() > 1.0
    assert 0 < beyond.sum() < len(PAIRS)
    assert torch.equal(policy.chosen.grad == 0, beyond)
