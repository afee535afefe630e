"""What full-batch training on known preferences converges to: closed forms over a finite set of completions.

The policy is a softmax table. Every ordered pair of completions (i, j) is in the data with weight p_ij, the
exact probability that i is preferred.
"""

import math

import pytest
import torch

from lightning_dpo.losses import DPOLoss, HingeLoss, IPOLoss
from lightning_dpo.types import PairLogps

REWARDS = torch.tensor([1.3, -0.4, 0.2, 2.1, -1.0], dtype=torch.float64)
REFERENCE = torch.softmax(torch.tensor([0.5, 1.1, -0.7, -1.5, 0.0], dtype=torch.float64), 0)


def bradley_terry(rewards):
    return 1 / (1 + torch.exp(rewards[None, :] - rewards[:, None]))


def train(loss, preferences, reference, *, steps=200):
    """Minimise the population loss; returns the policy's probabilities."""
    chosen, rejected = (preferences.fill_diagonal_(0) > 0).nonzero(as_tuple=True)
    weights = preferences[chosen, rejected]
    ones = torch.ones_like(weights)
    theta = reference.log().clone().requires_grad_()
    reference_logps = PairLogps(reference.log()[chosen], reference.log()[rejected], ones, ones)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=steps, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        logps = theta.log_softmax(0)
        pair_losses = loss(PairLogps(logps[chosen], logps[rejected], ones, ones), reference_logps)
        value = (weights * pair_losses).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach().softmax(0)


def total_variation(first, second):
    return (first - second).abs().sum().item() / 2


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_dpo_reaches_the_optimum_of_the_constrained_objective(beta):
    policy = train(DPOLoss(beta), bradley_terry(REWARDS), REFERENCE)
    tilted = REFERENCE * torch.exp(REWARDS / beta)
    assert total_variation(policy, tilted / tilted.sum()) < 1e-6
    assert total_variation(policy, REFERENCE) > 0.05


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_dpo_under_a_divergence_reaches_its_optimum(divergence):
    beta = 2.0
    policy = train(
        DPOLoss(beta, divergence=divergence, alpha=0.5), bradley_terry(REWARDS), REFERENCE, steps=2000
    )
    t = policy / REFERENCE
    derivative = {  # f'(t) of each divergence; the optimum has beta f'(pi / pi_ref) = r - constant
        "forward_kl": -1 / t,
        "js_divergence": torch.log(2 * t / (1 + t)),
        "alpha_divergence": -2 * t ** (-0.5),
    }[divergence]
    constant = REWARDS - beta * derivative
    assert (constant.max() - constant.min()).item() < 1e-5


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_dpo_drives_a_beaten_completion_to_zero_at_every_beta(beta):
    # There is no optimum to converge to: at every distance the loss still falls on the way further out. The
    # steps have a fixed length because the gradient fades like exp(-beta Delta).
    reference = torch.tensor([0.3, 0.7], dtype=torch.float64)
    theta = reference.log().clone().requires_grad_()
    ones = torch.ones(1)
    reference_logps = PairLogps(*reference.log().split(1), ones, ones)
    for _ in range(100):
        policy = PairLogps(*theta.log_softmax(0).split(1), ones, ones)
        (gradient,) = torch.autograd.grad(DPOLoss(beta)(policy, reference_logps).sum(), theta)
        assert gradient[0] < 0 < gradient[1]
        theta = (theta - 0.1 * gradient.sign()).detach().requires_grad_()
    assert theta.softmax(0)[1].item() < 1e-3


def test_conservative_dpo_and_hinge_keep_it():
    reference = torch.tensor([0.3, 0.7], dtype=torch.float64)
    always_first = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    policy = train(DPOLoss(0.5, label_smoothing=0.1), always_first.clone(), reference)
    assert margin(policy, reference, 0, 1) == pytest.approx(math.log(0.9 / 0.1) / 0.5, abs=1e-6)
    policy = train(HingeLoss(0.5), always_first.clone(), reference)
    assert margin(policy, reference, 0, 1) >= 1 / 0.5 - 1e-6


def margin(policy, reference, i, j):
    logratio = (policy / reference).log()
    return (logratio[i] - logratio[j]).item()


@pytest.mark.parametrize("tau", [0.1, 0.5, 3.0])
def test_summed_ipo_reaches_its_closed_form(tau):
    preferences = bradley_terry(REWARDS)
    wins = preferences.mean(1)  # the diagonal is 1/2
    policy = train(IPOLoss(tau, length_normalized=False), preferences.clone(), REFERENCE)
    tilted = REFERENCE * torch.exp(wins / tau)
    assert total_variation(policy, tilted / tilted.sum()) < 1e-6


@pytest.mark.parametrize("tau", [0.1, 2.0])
def test_summed_ipo_on_a_deterministic_order_of_three(tau):
    order = torch.triu(torch.ones(3, 3, dtype=torch.float64), 1)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    policy = train(IPOLoss(tau, length_normalized=False), order, reference)
    assert margin(policy, reference, 0, 1) == pytest.approx(1 / (3 * tau), abs=1e-7)
    assert margin(policy, reference, 1, 2) == pytest.approx(1 / (3 * tau), abs=1e-7)
    assert margin(policy, reference, 0, 2) == pytest.approx(2 / (3 * tau), abs=1e-7)


def test_summed_ipo_on_pairs_that_share_no_completion():
    tau = 0.4
    preferences = torch.zeros(4, 4, dtype=torch.float64)
    preferences[0, 1] = preferences[3, 2] = 1.0
    reference = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    policy = train(IPOLoss(tau, length_normalized=False), preferences, reference)
    assert margin(policy, reference, 0, 1) == pytest.approx(1 / (2 * tau), abs=1e-7)
    assert margin(policy, reference, 3, 2) == pytest.approx(1 / (2 * tau), abs=1e-7)


def test_ipo_tends_to_the_reference_as_tau_grows():
    order = torch.triu(torch.ones(3, 3, dtype=torch.float64), 1)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    distances = [
        total_variation(train(IPOLoss(tau, length_normalized=False), order.clone(), reference), reference)
        for tau in (0.1, 1.0, 10.0, 1000.0)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3


def masses_on_the_way(loss, reference, *, steps):
    """Probabilities after each small step of descent, where completion 0 always beats completion 1."""
    theta = reference.log().clone().requires_grad_()
    ones = torch.ones(1)
    reference_logps = PairLogps(*reference.log()[:2].split(1), ones, ones)
    masses = []
    for _ in range(steps):
        policy = PairLogps(*theta.log_softmax(0)[:2].split(1), ones, ones)
        (gradient,) = torch.autograd.grad(loss(policy, reference_logps).sum(), theta)
        theta = (theta - 0.1 * gradient).detach().requires_grad_()
        masses.append(theta.detach().softmax(0))
    return torch.stack(masses)


def test_chi_po_moves_less_mass_than_dpo_to_a_completion_outside_the_data():
    # The third completion is in no pair (the case of https://arxiv.org/abs/2404.10719). DPO leaves its logit
    # alone and takes mass from the beaten completion faster than the winner can have it.
    reference = torch.tensor([0.05, 0.65, 0.3], dtype=torch.float64)
    dpo = masses_on_the_way(DPOLoss(0.5), reference, steps=2000)
    chi_po = masses_on_the_way(DPOLoss(0.5, divergence="chi_squared_kl"), reference, steps=2000)
    assert min(dpo[-1, 0], chi_po[-1, 0]) > 0.5
    assert dpo[:, 2].max() > 0.45
    assert chi_po[:, 2].max() - reference[2] < 0.6 * (dpo[:, 2].max() - reference[2])
    # At every mass that both give the winner on their way.
    shares = torch.linspace(0.1, 0.5, 9, dtype=torch.float64)
    unseen = [path[torch.searchsorted(path[:, 0].contiguous(), shares), 2] for path in (chi_po, dpo)]
    assert (unseen[0] < unseen[1]).all()
