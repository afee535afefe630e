"""The rewards of every loss, by hand: what it compares, in its own units."""

import inspect
from math import e, exp, log

import pytest
import torch

from lightning_dpo import losses as L
from lightning_dpo.types import PairLogps


def logps(chosen, rejected, common_chosen, common_rejected):
    """Two pairs: completions of 2 and 4 tokens, and of 4 and 1."""
    lengths = torch.tensor([2, 4]), torch.tensor([4, 1])
    chosen, rejected, *common = (
        torch.tensor(values, dtype=torch.float64)
        for values in (chosen, rejected, common_chosen, common_rejected)
    )
    return PairLogps(chosen, rejected, *lengths, *common)


# Log-ratios are 1 and -1 for the chosen, -3 and 2 for the rejected completions. By sums the policy prefers
# the chosen completion in the first pair only, by means over tokens (-3 to -2, -1 to -3) in the second only.
POLICY = logps([-6.0, -4.0], [-8.0, -3.0], [-6.0, -1.0], [-5.0, -3.0])
REFERENCE = logps([-7.0, -3.0], [-5.0, -5.0], [-7.0, -2.0], [-4.0, -5.0])

BETA_R = [0.5, -0.5], [-1.5, 1.0]
SIMPO = [-6.0, -2.0], [-4.0, -6.0]
ORPO = [-log(e**3 - 1), -log(e - 1)], [-log(e**2 - 1), -log(e**3 - 1)]
SFT = [-3.0, -1.0], [-2.0, -3.0]
REWARDS = {
    "DPO": (L.DPOLoss(0.5, label_smoothing=0.1), BETA_R),
    "DPO, forward KL": (
        L.DPOLoss(0.5, divergence="forward_kl"),
        ([(1 - exp(-1)) / 2, (1 - exp(1)) / 2], [(1 - exp(3)) / 2, (1 - exp(-2)) / 2]),
    ),
    "DPO, Jensen-Shannon": (
        L.DPOLoss(0.5, divergence="js_divergence"),
        (
            [log(2 / (1 + exp(-1))) / 2, log(2 / (1 + exp(1))) / 2],
            [log(2 / (1 + exp(3))) / 2, log(2 / (1 + exp(-2))) / 2],
        ),
    ),
    "IPO": (L.IPOLoss(0.5), ([0.25, -0.125], [-0.375, 1.0])),
    "IPO, summed": (L.IPOLoss(0.5, length_normalized=False), BETA_R),
    "IPO, forward KL": (
        L.IPOLoss(0.5, divergence="forward_kl"),
        ([(1 - exp(-1)) / 4, (1 - exp(1)) / 8], [(1 - exp(3)) / 8, (1 - exp(-2)) / 2]),
    ),
    "hinge": (L.HingeLoss(0.5), BETA_R),
    "robust": (L.RobustDPOLoss(0.5, label_smoothing=0.2), BETA_R),
    "length-normalised": (L.LengthNormalizedDPOLoss(5.0), ([2.5, -1.25], [-3.75, 10.0])),
    "EXO": (L.EXOLoss(0.5), BETA_R),
    "DiscoPOP": (L.DiscoPOPLoss(0.5), BETA_R),
    "R-DPO": (L.RDPOLoss(0.5, length_penalty=0.1), BETA_R),
    "ODPO": (L.ODPOLoss(0.5), BETA_R),
    "chi-PO": (
        L.DPOLoss(0.5, divergence="chi_squared_kl", max_reward=0.1),
        ([e / 2, (1 / e - 2) / 2], [(exp(-3) - 4) / 2, (e**2 + 1) / 2]),
    ),
    "DPOP": (L.DPOPLoss(0.5, anchor=5.0), BETA_R),
    "NCA": (L.NCALoss(0.5), BETA_R),
    "BCO": (L.BCOLoss(0.5), BETA_R),
    "SPPO": (L.SPPOLoss(0.5), BETA_R),
    "APO zero": (L.APOZeroLoss(0.5), BETA_R),
    "APO down": (L.APODownLoss(0.5), BETA_R),
    "AOT": (L.AOTLoss(0.5), BETA_R),
    "AOT, unpaired": (L.AOTLoss(0.5, unpaired=True), BETA_R),
    "SimPO": (L.SimPOLoss(2.0, gamma=1.0), SIMPO),
    "ORPO": (L.ORPOLoss(0.2), ORPO),
    "CPO": (L.CPOLoss(0.5, sft_weight=0.3), ([-3.0, -2.0], [-4.0, -1.5])),
    "SFT": (L.SFTLoss(), SFT),
    "SFT, by token": (L.SFTLoss(token_weighted=True), SFT),
    "unlikelihood": (L.UnlikelihoodLoss(0.4), ([-6.0, -4.0], [-8.0, -3.0])),
    "WPO": (L.WPO(L.DPOLoss(0.5)), BETA_R),
    "WPO of SimPO": (L.WPO(L.SimPOLoss(2.0)), SIMPO),
    # The longer completion counts -6.5 (reference -4.5) in the first pair, -2.5 (-2.5) in the other.
    "LD-DPO": (L.LDDPO(L.DPOLoss(0.5), alpha=0.5), ([0.5, 0.0], [-1.0, 1.0])),
    "LD-SimPO": (L.LDDPO(L.SimPOLoss(2.0), alpha=0.5), ([-6.0, -2.0], [-13 / 3, -6.0])),
    "the first with beta": (L.CombinedLoss([L.SFTLoss(), L.WPO(L.DPOLoss(0.5)), L.SimPOLoss()]), BETA_R),
    "SimPO first": (L.CombinedLoss([L.SimPOLoss(2.0), L.DPOLoss(0.5)], weights=[0.1, 3.0]), SIMPO),
    "none with beta": (L.CombinedLoss([L.ORPOLoss(), L.UnlikelihoodLoss()]), ORPO),
}


def test_every_public_loss_has_its_rewards_here():
    paired = [name for name in L.__all__ if issubclass(getattr(L, name), L.PreferenceLoss)]
    concrete = {name for name in paired if not inspect.isabstract(getattr(L, name))}
    assert {type(loss).__name__ for loss, _ in REWARDS.values()} == concrete


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_are_what_the_loss_compares(name):
    loss, expected = REWARDS[name]
    for measured, values in zip(loss.rewards(POLICY, REFERENCE), expected, strict=True):
        torch.testing.assert_close(measured, measured.new_tensor(values), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name, (loss, _) in REWARDS.items() if not loss.needs_reference])
def test_losses_that_need_no_reference_read_none(name):
    loss, _ = REWARDS[name]
    for alone, beside in zip(loss.rewards(POLICY, None), loss.rewards(POLICY, REFERENCE), strict=True):
        assert torch.equal(alone, beside)


def test_the_shift_of_bco_moves_no_rewards():
    loss = L.BCOLoss(0.5)
    loss(POLICY, REFERENCE)
    assert loss.delta != 0
    seen = loss.pairs_seen.clone()
    chosen, rejected = loss.rewards(POLICY, REFERENCE)
    assert (chosen.tolist(), rejected.tolist()) == BETA_R
    assert loss.pairs_seen == seen


class OfOnesOwn(L.PreferenceLoss):
    def __init__(self, beta=1.0):
        super().__init__()
        self.beta = beta

    def forward(self, policy, reference=None):
        raise NotImplementedError


class WithoutReference(OfOnesOwn):
    needs_reference = False


@pytest.mark.parametrize(
    ("loss", "reference", "expected"),
    [
        (OfOnesOwn(0.5), REFERENCE, BETA_R),
        (OfOnesOwn(), REFERENCE, ([1.0, -1.0], [-3.0, 2.0])),
        (OfOnesOwn(0.5), None, ([-3.0, -2.0], [-4.0, -1.5])),
        (WithoutReference(0.5), REFERENCE, ([-3.0, -2.0], [-4.0, -1.5])),
    ],
)
def test_a_loss_of_ones_own_has_rewards_without_saying_which(loss, reference, expected):
    chosen, rejected = loss.rewards(POLICY, reference)
    assert (chosen.tolist(), rejected.tolist()) == expected
