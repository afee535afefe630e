"""Losses of unpaired feedback against values worked out by hand, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_dpo import functional
from lightning_dpo.losses import KTOLoss, UnpairedAPOZeroLoss
from lightning_dpo.types import CompletionLogps

LABELS = torch.tensor([True, False, True, False])
POLICY = [-3.0, -7.5, -1.25, -2.0]
REFERENCE = [-4.0, -5.0, -1.0, -2.5]
LOGRATIOS = [1.0, -2.5, -0.25, 0.5]


def logps(values: list[float], *, dtype: torch.dtype = torch.float64) -> CompletionLogps:
    return CompletionLogps(torch.tensor(values, dtype=dtype), torch.ones(len(values)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(*, beta: float, z0: float, up: float = 1.0, down: float = 1.0) -> list[float]:
    """lambda - v of the paper: lambda_D (1 - s(beta (r - z0))) and lambda_U (1 - s(beta (z0 - r)))."""
    return [
        up * (1 - sigmoid(beta * (r - z0))) if label else down * (1 - sigmoid(beta * (z0 - r)))
        for r, label in zip(LOGRATIOS, LABELS.tolist(), strict=True)
    ]


def test_kto_by_hand() -> None:
    loss = KTOLoss(beta=0.3, desirable_weight=1.5, undesirable_weight=0.75)
    losses = loss(logps(POLICY), logps(REFERENCE), labels=LABELS, z0=torch.tensor(0.4, dtype=torch.float64))
    expected = by_hand(beta=0.3, z0=0.4, up=1.5, down=0.75)
    torch.testing.assert_close(losses, torch.tensor(expected).double(), atol=1e-7, rtol=0)
    assert max(abs(a - b) for a, b in zip(losses.tolist(), expected, strict=True)) < 1e-12
    # One number without the formula: r - z0 = ln 3 / beta makes the sigmoid 3/4.
    at = functional.kto_loss(
        torch.tensor([math.log(3) / 0.3 + 0.4] * 2, dtype=torch.float64),
        labels=torch.tensor([True, False]),
        beta=0.3,
        z0=0.4,
    )
    assert at.tolist() == pytest.approx([0.25, 0.75], abs=1e-12)


def test_unpaired_apo_zero_by_hand() -> None:
    loss = UnpairedAPOZeroLoss(beta=0.3, desirable_weight=1.5)
    losses = loss(logps(POLICY), logps(REFERENCE), labels=LABELS).tolist()
    expected = [
        1.5 * (1 - sigmoid(0.3 * r)) if label else sigmoid(0.3 * r)
        for r, label in zip(LOGRATIOS, LABELS.tolist(), strict=True)
    ]
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-12


def test_halves_of_a_pair_add_up_to_apo_zero() -> None:
    chosen, rejected = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
    paired = functional.apo_zero_loss(chosen, rejected_logratio=rejected, beta=0.2)
    labels = torch.tensor([True, True, False, False])
    halves = functional.unpaired_apo_zero_loss(torch.cat([chosen, rejected]), labels=labels, beta=0.2)
    torch.testing.assert_close(halves[:2] + halves[2:], paired, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("policy", "weights", "z0"),
    [
        ([1.0, 2.0, 6.0], [1.0, 1.0, 1.0], 3.0),
        ([1.0, 2.0, 6.0], [1.0, 0.0, 3.0], 4.75),
        ([-1.0, -2.0, 1.0], [1.0, 1.0, 1.0], 0.0),
        ([1.0, 2.0, 6.0], [0.0, 0.0, 0.0], 0.0),
    ],
    ids=["mean", "weighted", "never below 0", "nothing mismatched"],
)
def test_z0(policy: list[float], weights: list[float], z0: float) -> None:
    scored = logps(policy)
    scored.logps.requires_grad_()
    estimate = KTOLoss.estimate_z0(scored, logps([0.0, 0.0, 0.0]), weights=torch.tensor(weights))
    assert estimate.item() == pytest.approx(z0, abs=1e-12)
    assert not estimate.requires_grad


@pytest.mark.parametrize("z0", [0.0, 0.7])
def test_gradients(z0: float) -> None:
    def losses(logratio: torch.Tensor) -> torch.Tensor:
        return functional.kto_loss(
            logratio, labels=LABELS, beta=0.3, z0=z0, desirable_weight=1.2, undesirable_weight=0.8
        )

    logratio = torch.tensor(LOGRATIOS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses, logratio)
    (gradient,) = torch.autograd.grad(losses(logratio).sum(), logratio)
    # Desirable completions rise and undesirable ones fall.
    assert (gradient < 0).tolist() == LABELS.tolist()


def test_far_log_ratios_keep_their_digits() -> None:
    far = functional.kto_loss(
        torch.tensor([400.0, -400.0]).double(), labels=torch.tensor([True, False]), beta=0.1
    )
    expected = math.exp(-40) / (1 + math.exp(-40))
    assert far.tolist() == pytest.approx([expected] * 2, rel=1e-12)


def test_the_start() -> None:
    same = logps(POLICY)
    assert KTOLoss(beta=0.3)(same, same, labels=LABELS).tolist() == [0.5] * 4
    assert KTOLoss().expected_at_start() == 0.5
    assert UnpairedAPOZeroLoss(desirable_weight=3.0, undesirable_weight=3.0).expected_at_start() == 1.5
    assert KTOLoss(desirable_weight=2.0).expected_at_start() is None


def test_rewards_are_beta_times_log_ratios() -> None:
    rewards = KTOLoss(beta=0.3).rewards(logps(POLICY), logps(REFERENCE))
    assert rewards.tolist() == pytest.approx([0.3 * r for r in LOGRATIOS], abs=1e-12)


@pytest.mark.parametrize(
    "arguments", [{"beta": 0.0}, {"desirable_weight": -1.0}, {"undesirable_weight": math.inf}], ids=str
)
def test_arguments_out_of_range(arguments: dict[str, float]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number"):
        KTOLoss(**arguments)
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number"):
        UnpairedAPOZeroLoss(**arguments)
