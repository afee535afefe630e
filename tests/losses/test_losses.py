"""Every loss class against its formula in 50 digits, its value at the start, and what it reads."""

import math
from decimal import Decimal, localcontext

import pytest
import torch

from lightning_dpo import losses as L
from lightning_dpo.types import PairLogps

# policy chosen, policy rejected, reference chosen, reference rejected, chosen length, rejected length
PAIRS = [
    (-40.25, -61.5, -43.0, -58.125, 11, 17),
    (-12.5, -9.75, -10.25, -11.0, 5, 3),
    (-80.0, -80.0, -80.0, -80.0, 20, 20),
    (-33.0, -7.5, -21.5, -14.25, 8, 2),
    (-3.5, -55.75, -14.0, -50.5, 1, 30),
    (-25.125, -24.5, -26.0, -24.0, 9, 9),
]


MARGINS = [0.25, 4.0, 1.0, 0.0, 12.5, 0.5]


def policy_and_reference(pairs=PAIRS, dtype=torch.float64):
    pc, pr, rc, rr, lc, lr = zip(*pairs, strict=True)
    margins = torch.tensor([MARGINS[index % len(MARGINS)] for index in range(len(pairs))], dtype=dtype)
    chosen_lengths, rejected_lengths = torch.tensor(lc), torch.tensor(lr)
    policy, reference = (
        PairLogps(
            torch.tensor(chosen, dtype=dtype, requires_grad=True),
            torch.tensor(rejected, dtype=dtype, requires_grad=True),
            chosen_lengths,
            rejected_lengths,
            margins=margins,
        )
        for chosen, rejected in ((pc, pr), (rc, rr))
    )
    return policy, reference


def D(x):
    return Decimal(x)


def sigma(x):
    return 1 / (1 + (-x).exp())


def log_sigma(x):
    return sigma(x).ln()


def smoothed(x, e=Decimal(0)):
    return -(1 - e) * log_sigma(x) - e * log_sigma(-x)


def on_ratios(formula):
    """A formula of (r chosen, r rejected, chosen length, rejected length) as one of a pair."""
    return lambda pc, pr, rc, rr, lc, lr: formula(pc - rc, pr - rr, lc, lr)


def odds(p):
    return p / (1 - p)


B = D(0.3)
SCORES = {
    "forward_kl": lambda r: 1 - (-r).exp(),
    "js_divergence": lambda r: D(2).ln() + log_sigma(r),
    "alpha_divergence": lambda r: (((D(0.25) - 1) * r).exp() - 1) / (D(0.25) - 1),
    "chi_squared_kl": lambda r: r.exp() - 1 + r,
}
CASES = {
    "DPO": (L.DPOLoss(0.3), on_ratios(lambda c, r, m, n: -log_sigma(B * (c - r)))),
    "cDPO": (
        L.DPOLoss(beta=0.3, label_smoothing=0.2),
        on_ratios(lambda c, r, m, n: smoothed(B * (c - r), D(0.2))),
    ),
    "IPO": (L.IPOLoss(0.3), on_ratios(lambda c, r, m, n: (c / m - r / n - 1 / (2 * B)) ** 2)),
    "IPO, summed": (
        L.IPOLoss(0.3, length_normalized=False),
        on_ratios(lambda c, r, m, n: (c - r - 1 / (2 * B)) ** 2),
    ),
    "hinge": (L.HingeLoss(0.3), on_ratios(lambda c, r, m, n: max(D(0), 1 - B * (c - r)))),
    "robust": (
        L.RobustDPOLoss(0.3, label_smoothing=0.2),
        on_ratios(
            lambda c, r, m, n: (
                (-(1 - D(0.2)) * log_sigma(B * (c - r)) + D(0.2) * log_sigma(-B * (c - r))) / (1 - 2 * D(0.2))
            )
        ),
    ),
    "length-normalised": (
        L.LengthNormalizedDPOLoss(0.3),
        on_ratios(lambda c, r, m, n: -log_sigma(B * (c / m - r / n))),
    ),
    "EXO": (
        L.EXOLoss(0.3, label_smoothing=0.01),
        on_ratios(
            lambda c, r, m, n: (
                sigma(B * (c - r)) * (sigma(B * (c - r)) / (1 - D(0.01))).ln()
                + sigma(-B * (c - r)) * (sigma(-B * (c - r)) / D(0.01)).ln()
            )
        ),
    ),
    "DiscoPOP": (
        L.DiscoPOPLoss(0.3, tau=0.1),
        on_ratios(
            lambda c, r, m, n: (
                (1 - sigma(B * (c - r) / D(0.1))) * -log_sigma(B * (c - r))
                + sigma(B * (c - r) / D(0.1)) * (-B * (c - r)).exp()
            )
        ),
    ),
    "R-DPO": (
        L.RDPOLoss(0.3, length_penalty=0.02),
        on_ratios(lambda c, r, m, n: -log_sigma(B * (c - r) + D(0.02) * (m - n))),
    ),
    "DPO, clipped": (
        L.DPOLoss(0.3, max_reward=0.5),
        on_ratios(lambda c, r, m, n: -log_sigma(max(D(-1), min(D(1), B * (c - r))))),
    ),
    "chi-PO": (
        L.DPOLoss(0.3, divergence="chi_squared_kl", max_reward=5.0),
        on_ratios(lambda c, r, m, n: -log_sigma(max(D(-10), min(D(10), B * (c.exp() + c - r.exp() - r))))),
    ),
    "DPOP": (
        L.DPOPLoss(0.3, anchor=5.0),
        on_ratios(lambda c, r, m, n: -log_sigma(B * (c - r - 5 * max(D(0), -c)))),
    ),
    "NCA": (
        L.NCALoss(0.3),
        on_ratios(lambda c, r, m, n: -log_sigma(B * c) - log_sigma(-B * c) / 2 - log_sigma(-B * r) / 2),
    ),
    "BCO": (
        L.BCOLoss(0.3, track_delta=False),
        on_ratios(lambda c, r, m, n: -log_sigma(B * c) - log_sigma(-B * r)),
    ),
    "SPPO": (
        L.SPPOLoss(0.3),
        on_ratios(lambda c, r, m, n: (c - 1 / (2 * B)) ** 2 + (r + 1 / (2 * B)) ** 2),
    ),
    "APO zero": (L.APOZeroLoss(0.3), on_ratios(lambda c, r, m, n: 1 - sigma(B * c) + sigma(B * r))),
    "APO down": (L.APODownLoss(0.3), on_ratios(lambda c, r, m, n: sigma(B * c) + 1 - sigma(B * (c - r)))),
    "SimPO": (
        L.SimPOLoss(2.5, gamma=0.5),
        lambda pc, pr, rc, rr, m, n: -log_sigma(D(2.5) * (pc / m - pr / n) - D(0.5)),
    ),
    "ORPO": (
        L.ORPOLoss(0.2),
        lambda pc, pr, rc, rr, m, n: (
            -pc / m - D(0.2) * log_sigma((odds((pc / m).exp()) / odds((pr / n).exp())).ln())
        ),
    ),
    "CPO": (
        L.CPOLoss(0.3, sft_weight=0.5),
        lambda pc, pr, rc, rr, m, n: -log_sigma(B * (pc - pr)) - D(0.5) * pc,
    ),
    "SFT": (L.SFTLoss(), lambda pc, pr, rc, rr, m, n: -pc / m),
    "SFT, by token": (
        L.SFTLoss(token_weighted=True),
        lambda pc, pr, rc, rr, m, n: -pc / (D(sum(pair[4] for pair in PAIRS)) / len(PAIRS)),
    ),
    "unlikelihood": (L.UnlikelihoodLoss(0.4), lambda pc, pr, rc, rr, m, n: -pc + D(0.4) * pr),
}


@pytest.fixture(autouse=True)
def fifty_digits():
    with localcontext() as context:
        context.prec = 50
        yield


def expected(formula, pairs=PAIRS):
    return torch.tensor([float(formula(*map(Decimal, pair))) for pair in pairs], dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_their_formulas(name):
    loss, formula = CASES[name]
    measured = loss(*policy_and_reference())
    torch.testing.assert_close(measured, expected(formula), rtol=1e-12, atol=1e-12)


def test_the_margin_per_token_divides_each_score_by_its_completion_length():
    policy, reference = policy_and_reference()
    measured = L.DPOLoss(0.3).margin_per_token(policy, reference)
    by_hand = [(pc - rc) / lc - (pr - rr) / lr for pc, pr, rc, rr, lc, lr in PAIRS]
    torch.testing.assert_close(measured, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("divergence", SCORES)
def test_divergences_go_with_every_loss_on_the_margin(divergence):
    s = SCORES[divergence]
    options = {"divergence": divergence, "alpha": 0.25}
    formulas = {
        L.DPOLoss(0.3, label_smoothing=0.2, **options): lambda c, r, m, n: smoothed(
            B * (s(c) - s(r)), D(0.2)
        ),
        L.IPOLoss(0.3, **options): lambda c, r, m, n: (s(c) / m - s(r) / n - 1 / (2 * B)) ** 2,
        L.IPOLoss(0.3, length_normalized=False, **options): (
            lambda c, r, m, n: (s(c) - s(r) - 1 / (2 * B)) ** 2
        ),
        L.HingeLoss(0.3, **options): lambda c, r, m, n: max(D(0), 1 - B * (s(c) - s(r))),
        L.LengthNormalizedDPOLoss(0.3, **options): lambda c, r, m, n: smoothed(B * (s(c) / m - s(r) / n)),
        L.RobustDPOLoss(0.3, label_smoothing=0.0, **options): lambda c, r, m, n: smoothed(B * (s(c) - s(r))),
    }
    for loss, formula in formulas.items():
        measured = loss(*policy_and_reference())
        torch.testing.assert_close(measured, expected(on_ratios(formula)), rtol=1e-11, atol=1e-12)


def aot_formula(pairs, *, unpaired, e):
    if unpaired:
        first = sorted(D(pc) - D(rc) for pc, _, rc, *_ in pairs)
        second = sorted(D(pr) - D(rr) for _, pr, _, rr, *_ in pairs)
    else:
        first = sorted(D(pc) - D(pr) for pc, pr, *_ in pairs)
        second = sorted(D(rc) - D(rr) for _, _, rc, rr, *_ in pairs)
    return [float(smoothed(B * (a - b), e)) for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("unpaired", [False, True])
def test_aot_sorts_over_the_batch(unpaired):
    policy, reference = policy_and_reference()
    measured = L.AOTLoss(0.3, label_smoothing=0.2, unpaired=unpaired)(policy, reference)
    values = policy.chosen - (reference.chosen if unpaired else policy.rejected)
    formula = torch.tensor(aot_formula(PAIRS, unpaired=unpaired, e=D(0.2)), dtype=torch.float64)
    torch.testing.assert_close(measured[values.argsort()], formula, rtol=1e-12, atol=1e-12)


def test_aot_of_one_pair_is_dpo():
    pair = policy_and_reference(PAIRS[:1])
    torch.testing.assert_close(L.AOTLoss(0.3)(*pair), L.DPOLoss(0.3)(*pair), rtol=1e-12, atol=1e-12)


ALL = (
    {name: loss for name, (loss, _) in CASES.items()}
    | {
        "ODPO": L.ODPOLoss(0.3),
        "ODPO, linear": L.ODPOLoss(0.3, offset_scale="linear"),
        "ODPO without its offset": L.ODPOLoss(0.3, offset_weight=0.0),
        "R-DPO without its penalty": L.RDPOLoss(0.3, length_penalty=0.0),
        "AOT": L.AOTLoss(0.3),
        "AOT, unpaired": L.AOTLoss(0.3, unpaired=True),
        "BCO, tracking": L.BCOLoss(0.3),
        "combined": L.CombinedLoss([L.DPOLoss(0.3), L.IPOLoss(0.5)], weights=[0.5, 2.0]),
        "combined with SFT": L.CombinedLoss([L.DPOLoss(0.3), L.SFTLoss()]),
    }
    | {f"DPO, {divergence}": L.DPOLoss(0.3, divergence=divergence) for divergence in SCORES}
    | {f"IPO, {divergence}": L.IPOLoss(0.3, divergence=divergence) for divergence in SCORES}
)


@pytest.mark.parametrize("name", ALL)
def test_expected_at_start_is_the_loss_where_policy_equals_reference(name):
    _, reference = policy_and_reference()
    measured = ALL[name](reference, reference)
    value = ALL[name].expected_at_start()
    if value is None:
        assert measured.std() > 0, "a loss that depends on the data was expected"
    else:
        torch.testing.assert_close(measured, torch.full_like(measured, value), rtol=1e-12, atol=1e-12)


def test_values_at_start_known_by_heart():
    assert L.DPOLoss(0.7, label_smoothing=0.1).expected_at_start() == math.log(2)
    assert L.IPOLoss(0.1).expected_at_start() == pytest.approx(25.0)
    assert L.HingeLoss().expected_at_start() == 1.0
    assert L.SimPOLoss().expected_at_start() is None


@pytest.mark.parametrize("name", ALL)
def test_reference_is_needed_exactly_where_it_says_so(name):
    loss = ALL[name]
    policy, reference = policy_and_reference()
    if loss.needs_reference:
        with pytest.raises(ValueError, match=r"`reference` must hold .* for \w+Loss, got None; give"):
            loss(policy, None)
    else:
        torch.testing.assert_close(loss(policy, None), loss(policy, reference), rtol=0, atol=0)


def test_losses_without_a_reference():
    free = {type(loss).__name__ for loss in ALL.values() if not loss.needs_reference}
    assert free == {"SimPOLoss", "ORPOLoss", "CPOLoss", "SFTLoss", "UnlikelihoodLoss"}


@pytest.mark.parametrize("name", ALL)
def test_shape_dtype_and_gradient(name):
    policy, reference = policy_and_reference(dtype=torch.float32)
    measured = ALL[name](policy, reference)
    assert measured.shape == (len(PAIRS),)
    assert measured.dtype == torch.float32
    measured.mean().backward()
    assert policy.chosen.grad.isfinite().all()
    assert (policy.chosen.grad != 0).any()


@pytest.mark.parametrize("name", ALL)
def test_extreme_log_probs_stay_finite_in_float32(name):
    far, near = -1e4 - 50.0, -50.0
    corners = [(a, b, near, near, 7, 9) for a in (far, near) for b in (far, near)]
    corners += [(near, near, a, b, 7, 9) for a in (far, near) for b in (far, near)]
    policy, reference = policy_and_reference(corners, dtype=torch.float32)
    measured = ALL[name](policy, reference)
    measured.sum().backward()
    assert measured.isfinite().all()
    assert policy.chosen.grad.isfinite().all()
    if policy.rejected.grad is not None:
        assert policy.rejected.grad.isfinite().all()


def bco_formula(delta):
    return on_ratios(lambda c, r, m, n: -log_sigma(B * c - delta) - log_sigma(delta - B * r))


class TestBCO:
    def test_running_mean_counts_every_pair_once(self):
        loss = L.BCOLoss(0.3)
        rewards = []
        for batch in (PAIRS[:1], PAIRS[1:4], PAIRS[4:]):
            policy, reference = policy_and_reference(batch)
            measured = loss(policy, reference)
            rewards += [0.3 * (p - r) for pair in batch for p, r in (pair[0:3:2], pair[1:4:2])]
            assert loss.delta.item() == pytest.approx(sum(rewards) / len(rewards), rel=1e-6)
            formula = bco_formula(D(loss.delta.item()))
            torch.testing.assert_close(measured, expected(formula, batch), rtol=1e-12, atol=1e-12)
        assert loss.pairs_seen.item() == len(PAIRS)

    def test_a_first_batch_that_counts_nothing_leaves_the_mean(self):
        loss, other = L.BCOLoss(0.3), L.BCOLoss(0.3)
        policy, reference = policy_and_reference()
        measured = loss(policy._replace(weights=torch.zeros(len(PAIRS))), reference)
        assert measured.isfinite().all()
        assert loss.delta == loss.pairs_seen == 0
        torch.testing.assert_close(loss(policy, reference), other(policy, reference), rtol=0, atol=0)
        assert loss.state_dict() == other.state_dict()

    def test_evaluation_reads_the_mean_and_leaves_it(self):
        loss = L.BCOLoss(0.3)
        loss(*policy_and_reference())
        state = {name: value.clone() for name, value in loss.state_dict().items()}
        assert state["delta"] != 0
        loss.eval()(*policy_and_reference(PAIRS[:2]))
        assert loss.state_dict() == state

    def test_mean_takes_no_gradient(self):
        policy, reference = policy_and_reference()
        L.BCOLoss(0.3)(policy, reference).sum().backward()
        tracked, policy.chosen.grad = policy.chosen.grad, None
        shifted = L.BCOLoss(0.3).eval()
        loss = L.BCOLoss(0.3)
        loss(policy, reference)
        shifted.load_state_dict(loss.state_dict())
        shifted(policy, reference).sum().backward()
        torch.testing.assert_close(policy.chosen.grad, tracked, rtol=1e-12, atol=0)

    def test_fixed_shift(self):
        loss = L.BCOLoss(0.3, track_delta=False)
        loss(*policy_and_reference())
        assert loss.delta.item() == 0
        assert loss.pairs_seen.item() == 0

    def test_mean_keeps_float32_in_a_bfloat16_module(self):
        assert L.BCOLoss().to(torch.bfloat16).delta.dtype == torch.float32


def test_a_loss_of_ones_own_takes_one_method():
    class Square(L.PreferenceLoss):
        def forward(self, policy, reference=None):
            chosen, rejected = self.logratios(policy, reference)
            return (chosen - rejected) ** 2

    policy, reference = policy_and_reference()
    assert Square()(policy, reference)[0].item() == (2.75 + 3.375) ** 2
    assert Square().expected_at_start() is None
    assert Square().beta == 1.0
