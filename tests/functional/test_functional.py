"""Score functions and losses as pure functions: values in 50 digits, gradients, extremes."""

import math
from decimal import Decimal, localcontext
from functools import partial

import pytest
import torch

from lightning_dpo import functional as F
from lightning_dpo.functional.scores import EXPONENT_LIMIT

RATIOS = [-29.0, -7.5, -1.0, -1e-9, 0.0, 1e-9, 0.3, 2.0, 11.0, 40.0]

MARGIN_LOSSES = {
    "dpo": partial(F.dpo_loss, beta=0.3),
    "cdpo": partial(F.dpo_loss, beta=0.3, label_smoothing=0.2),
    "ipo": partial(F.ipo_loss, beta=0.3),
    "hinge": partial(F.hinge_loss, beta=0.3),
    "robust": partial(F.robust_dpo_loss, beta=0.3, label_smoothing=0.2),
    "exo": partial(F.exo_loss, beta=0.3, label_smoothing=0.01),
    "discopop": partial(F.discopop_loss, beta=0.3, tau=0.05),
    "discopop, widest": partial(F.discopop_loss, beta=0.3, tau=1.0),
    "rdpo": partial(F.rdpo_loss, beta=0.3, length_difference=torch.tensor(-7), length_penalty=0.02),
    "odpo": partial(F.odpo_loss, beta=0.3, offset=torch.tensor(1.5)),
}
TWO_ARGUMENT_LOSSES = {
    "dpop": lambda a, b: F.dpop_loss(a - b, chosen_logratio=a, beta=0.3, anchor=5.0),
    "nca": lambda a, b: F.nca_loss(a, rejected_logratio=b, beta=0.3),
    "bco": lambda a, b: F.bco_loss(a, rejected_logratio=b, beta=0.3, shift=0.7),
    "sppo": lambda a, b: F.sppo_loss(a, rejected_logratio=b, beta=0.3),
    "apo_zero": lambda a, b: F.apo_zero_loss(a, rejected_logratio=b, beta=0.3),
    "apo_down": lambda a, b: F.apo_down_loss(a, rejected_logratio=b, beta=0.3),
    "aot": lambda a, b: F.dpo_loss(F.aot_margin(a, second=b), beta=0.3),
}
LOGP_LOSSES = {
    "simpo": lambda a, b: F.simpo_loss(a, rejected_mean_logps=b, beta=2.0, gamma=0.5),
    "orpo": lambda a, b: F.orpo_loss(a, rejected_mean_logps=b, odds_weight=0.2),
    "cpo": lambda a, b: F.cpo_loss(a, rejected_logps=b, beta=0.3, sft_weight=0.5),
    "unlikelihood": lambda a, b: F.unlikelihood_loss(a, rejected_logps=b, alpha=0.3),
}
SCORES = {
    "reverse_kl": F.reverse_kl_score,
    "forward_kl": F.forward_kl_score,
    "js_divergence": F.js_divergence_score,
    "alpha_divergence": partial(F.alpha_divergence_score, alpha=0.25),
    "chi_squared_kl": F.chi_squared_kl_score,
}


@pytest.fixture(autouse=True)
def fifty_digits():
    with localcontext() as context:
        context.prec = 50
        yield


def exact_score(name, r):
    """The table of score functions, in the form of quotients of probabilities."""
    t = r.exp()
    return {
        "reverse_kl": lambda: t.ln(),
        "forward_kl": lambda: 1 - 1 / t,
        "js_divergence": lambda: (2 * t / (1 + t)).ln(),
        "alpha_divergence": lambda: (t ** Decimal("-0.75") - 1) / Decimal("-0.75"),
        "chi_squared_kl": lambda: t + t.ln() - 1,
    }[name]()


@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_their_formulas(name):
    ratios = [x for x in RATIOS if name != "chi_squared_kl" or x < EXPONENT_LIMIT]
    r = torch.tensor(ratios, dtype=torch.float64)
    expected = torch.tensor([float(exact_score(name, Decimal(x))) for x in ratios], dtype=torch.float64)
    torch.testing.assert_close(SCORES[name](r), expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        F.divergence_score(r, divergence=name, alpha=0.25), expected, rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize(("name", "slope"), zip(SCORES, [1.0, 1.0, 0.5, 1.0, 2.0], strict=True))
def test_scores_start_at_zero_with_their_slope(name, slope):
    r = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    score = SCORES[name](r)
    score.backward()
    assert score.item() == pytest.approx(0.0, abs=1e-15)
    assert r.grad.item() == pytest.approx(slope, abs=1e-12)


def test_alpha_divergence_joins_the_two_kls():
    r = torch.tensor(RATIOS, dtype=torch.float64)
    torch.testing.assert_close(F.alpha_divergence_score(r, alpha=1.0), r, rtol=0, atol=0)
    torch.testing.assert_close(F.alpha_divergence_score(r, alpha=1 - 1e-9), r, rtol=1e-6, atol=1e-15)
    torch.testing.assert_close(
        F.alpha_divergence_score(r, alpha=0.0), F.forward_kl_score(r), rtol=1e-12, atol=0
    )


def test_scores_go_on_as_their_tangent_past_the_limit():
    r = torch.tensor([-EXPONENT_LIMIT - 10.0], dtype=torch.float64, requires_grad=True)
    score = F.forward_kl_score(r)
    score.backward()
    assert score.item() == pytest.approx(1 - 11 * math.exp(EXPONENT_LIMIT), rel=1e-12)
    assert r.grad.item() == pytest.approx(math.exp(EXPONENT_LIMIT), rel=1e-12)


def test_chi_squared_plus_kl_goes_on_as_its_tangent_upwards():
    r = torch.tensor([EXPONENT_LIMIT + 10.0], dtype=torch.float64, requires_grad=True)
    score = F.chi_squared_kl_score(r)
    score.backward()
    assert score.item() == pytest.approx(11 * math.exp(EXPONENT_LIMIT) + 39, rel=1e-12)
    assert r.grad.item() == pytest.approx(math.exp(EXPONENT_LIMIT) + 1, rel=1e-12)


def test_unknown_divergence_is_named():
    with pytest.raises(ValueError, match=r"`divergence` must be one of .*'js_divergence'.* got .*'chi2'"):
        F.divergence_score(torch.zeros(1), divergence="chi2")


@pytest.mark.parametrize("logit", [-1e4, -60.0, -2.0, 0.0, 2.0, 60.0, 1e4])
@pytest.mark.parametrize("name", ["dpo", "exo", "robust", "discopop", "discopop, widest", "rdpo", "odpo"])
def test_sigmoid_forms_stay_exact_far_out(name, logit):
    beta, tau, e = 0.3, 1.0 if "widest" in name else 0.05, 0.01 if name == "exo" else 0.2
    x = Decimal(beta) * Decimal(logit)
    m = 1 / (1 + (-x).exp())
    gate = 1 / (1 + (-x / Decimal(tau)).exp())
    e = Decimal(e)
    # log of p and 1 - p from the quotient of their exponentials, so that 50 digits are enough for 1e-4343
    log_p, log_q = -(1 + (-x).exp()).ln(), -(1 + x.exp()).ln()
    expected = {
        "dpo": lambda: -log_p,
        "exo": lambda: m * (log_p - (1 - e).ln()) + (1 - m) * (log_q - e.ln()),
        "robust": lambda: (-(1 - e) * log_p + e * log_q) / (1 - 2 * e),
        "discopop": lambda: (1 - gate) * -log_p + gate * (-x).exp(),
        "discopop, widest": lambda: (1 - gate) * -log_p + gate * (-x).exp(),
        "rdpo": lambda: (1 + (-x + Decimal("0.14")).exp()).ln(),
        "odpo": lambda: (1 + (-x + Decimal("1.5")).exp()).ln(),
    }[name]()
    loss = MARGIN_LOSSES[name](torch.tensor([logit], dtype=torch.float64))
    assert loss.item() == pytest.approx(float(expected), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("logp", [-30.0, -2.0, -0.7, -1e-3, -1e-6])
def test_log_odds(logp):
    p = Decimal(logp).exp()
    odds = F.log_odds(torch.tensor([logp], dtype=torch.float64))
    assert odds.item() == pytest.approx(float((p / (1 - p)).ln()), rel=1e-12)


def test_log_odds_are_finite_and_rising_at_probability_one():
    logps = torch.tensor([-1e-6, -1e-7, 0.0], requires_grad=True)
    odds = F.log_odds(logps)
    odds.sum().backward()
    assert odds.isfinite().all()
    assert (odds.diff() > 0).all()
    assert logps.grad.isfinite().all()
    assert (logps.grad > 0).all()


def test_aot_margin_pairs_equal_ranks():
    first = torch.tensor([5.0, -1.0, 3.0])
    second = torch.tensor([10.0, 0.0, 2.0])
    # sorted: (-1, 3, 5) against (0, 2, 10)
    assert F.aot_margin(first, second=second).tolist() == [5.0 - 10.0, -1.0 - 0.0, 3.0 - 2.0]


def leaf(values, dtype):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("name", SCORES)
def test_gradcheck_scores(name):
    assert torch.autograd.gradcheck(SCORES[name], leaf([-3.0, -0.4, 0.2, 2.5], torch.float64))


@pytest.mark.parametrize("function", [*SCORES.values(), F.log_odds])
def test_float32_gradients_keep_their_digits(function):
    values = [-3.0, -0.4, -0.02, -11.0]
    exact, rounded = leaf(values, torch.float64), leaf(values, torch.float32)
    function(exact).sum().backward()
    function(rounded).sum().backward()
    torch.testing.assert_close(rounded.grad.double(), exact.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_gradcheck_margin_losses(name):
    assert torch.autograd.gradcheck(MARGIN_LOSSES[name], leaf([-3.0, -0.4, 0.2, 2.5, 9.0], torch.float64))


@pytest.mark.parametrize("name", TWO_ARGUMENT_LOSSES)
def test_gradcheck_logratio_losses(name):
    ratios = leaf([-3.0, -0.4, 0.2, 2.5], torch.float64), leaf([1.0, -0.3, 0.9, -2.5], torch.float64)
    assert torch.autograd.gradcheck(TWO_ARGUMENT_LOSSES[name], ratios)


@pytest.mark.parametrize("name", LOGP_LOSSES)
def test_gradcheck_logp_losses(name):
    logps = leaf([-3.0, -0.4, -0.05, -2.5], torch.float64), leaf([-1.0, -0.3, -0.9, -9.0], torch.float64)
    assert torch.autograd.gradcheck(LOGP_LOSSES[name], logps)


def assert_finite(loss, *inputs):
    loss.sum().backward()
    assert loss.isfinite().all(), loss
    for value in inputs:
        assert value.grad.isfinite().all(), value.grad


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_margin_losses_are_finite_at_extremes_under_every_divergence(name, score):
    chosen = leaf([1e4, -1e4, 1e4, -1e4, 0.0, 0.0], torch.float32)
    rejected = leaf([-1e4, 1e4, 1e4, -1e4, 1e4, -1e4], torch.float32)
    delta = SCORES[score](chosen) - SCORES[score](rejected)
    assert_finite(MARGIN_LOSSES[name](delta), chosen, rejected)


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "robust", "discopop", "rdpo", "odpo"])
@pytest.mark.parametrize("score", SCORES)
def test_the_worst_pair_still_pulls_its_chosen_completion_up(name, score):
    chosen = leaf([-1e4], torch.float32)
    MARGIN_LOSSES[name](SCORES[score](chosen)).sum().backward()
    assert chosen.grad.item() < 0


@pytest.mark.parametrize("name", TWO_ARGUMENT_LOSSES)
def test_logratio_losses_are_finite_at_extremes(name):
    chosen, rejected = (
        leaf([1e4, -1e4, 1e4, -1e4], torch.float32),
        leaf([-1e4, 1e4, 1e4, -1e4], torch.float32),
    )
    assert_finite(TWO_ARGUMENT_LOSSES[name](chosen, rejected), chosen, rejected)


@pytest.mark.parametrize("name", LOGP_LOSSES)
def test_logp_losses_are_finite_at_extremes(name):
    chosen, rejected = (
        leaf([-1e4, 0.0, 0.0, -1e4], torch.float32),
        leaf([0.0, -1e4, 0.0, -1e4], torch.float32),
    )
    assert_finite(LOGP_LOSSES[name](chosen, rejected), chosen, rejected)


def test_robust_dpo_is_unbiased_under_flipped_labels():
    delta = torch.linspace(-20, 20, 9, dtype=torch.float64)
    robust = partial(F.robust_dpo_loss, beta=0.3, label_smoothing=0.2)
    torch.testing.assert_close(
        0.8 * robust(delta) + 0.2 * robust(-delta), F.dpo_loss(delta, beta=0.3), rtol=1e-12, atol=1e-12
    )


def test_conservative_dpo_is_smallest_at_the_log_odds_of_the_labels():
    best = math.log(0.8 / 0.2) / 0.3
    delta = leaf([best], torch.float64)
    F.dpo_loss(delta, beta=0.3, label_smoothing=0.2).sum().backward()
    assert delta.grad.item() == pytest.approx(0.0, abs=1e-15)


def test_public_names():
    assert all(callable(getattr(F, name)) for name in F.__all__ if name != "Divergence")
