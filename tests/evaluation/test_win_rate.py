"""Win rates and their intervals against closed forms, other optimisers and repeated draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_dpo.evaluation import WinRate, length_controlled_win_rate, win_rate


def simulated(prompts: int, comparisons: int, seed: int, *, by_length: float = 0.0) -> tuple[Tensor, ...]:
    """Outcomes whose log-odds have a part of each prompt's own, and one of the length."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(prompts, 1, generator=generator, dtype=torch.float64)
    lengths = 20 * torch.randn(prompts, comparisons, generator=generator, dtype=torch.float64) + 10
    logits = 0.4 + own + by_length * (lengths / 20).tanh()
    return torch.rand(logits.shape, generator=generator, dtype=torch.float64).lt(
        logits.sigmoid()
    ).double(), lengths


def test_one_comparison_of_each_prompt_is_wilsons_interval() -> None:
    outcomes = torch.tensor([1.0] * 60 + [0.0] * 40)[:, None]
    found = win_rate(outcomes)
    assert found.rate == pytest.approx(0.6)
    assert found.standard_error == pytest.approx(math.sqrt(0.24 / 99))
    # 60 of 100 by Wilson's formula with z = 1.96 is [0.502, 0.691]; with t of 99 degrees a little wider.
    assert (found.low, found.high) == pytest.approx((0.500, 0.692), abs=1e-3)
    assert str(found) == "60.0 % [50.0, 69.2]"


def test_a_tie_is_half_a_win() -> None:
    assert win_rate(torch.tensor([[1.0, 0.5], [0.5, 0.0]])).rate == 0.5


def test_repeating_a_prompts_outcomes_says_nothing_new() -> None:
    outcomes, _ = simulated(30, 1, 0)
    assert win_rate(outcomes.repeat(1, 50)).standard_error == pytest.approx(win_rate(outcomes).standard_error)


@pytest.mark.parametrize("prompts", [5, 40])
def test_the_interval_holds_the_truth_as_often_as_it_says(prompts: int) -> None:
    truth = float(simulated(200_000, 1, 1)[0].mean())
    found = [win_rate(simulated(prompts, 8, 100 + seed)[0]) for seed in range(400)]
    covered = sum(each.low <= truth <= each.high for each in found) / len(found)
    assert covered == pytest.approx(0.95, abs=0.035)
    spread = torch.tensor([each.rate for each in found]).std()
    assert sum(each.standard_error for each in found) / len(found) == pytest.approx(float(spread), rel=0.1)


def test_winning_every_time_leaves_doubt() -> None:
    found = win_rate(torch.ones(20, 4))
    assert (found.rate, found.high) == (1.0, 1.0)
    assert 0.75 < found.low < 0.9
    alone = win_rate(torch.tensor([[1.0, 0.0, 1.0]]))
    assert math.isnan(alone.standard_error)
    assert 0 < alone.low < alone.rate < alone.high < 1


def test_equal_lengths_change_nothing() -> None:
    outcomes, _ = simulated(30, 4, 0)
    plain = win_rate(outcomes)
    assert length_controlled_win_rate(outcomes, length_differences=torch.full((30, 4), 3.0)) == plain
    balanced = torch.tensor([[1.0, 1.0, 0.0, 1.0]] * 10)
    lengths = torch.tensor([[5.0, -5.0, 5.0, 5.0]] * 10)
    lengths[5:] *= -1  # wins and losses as often with the longer answer as with the shorter
    found = length_controlled_win_rate(balanced, length_differences=lengths)
    assert found.rate == pytest.approx(win_rate(balanced).rate, abs=1e-12)


def test_the_regression_is_the_optimum_that_another_optimiser_finds() -> None:
    outcomes, lengths = simulated(60, 3, 2, by_length=1.5)
    feature = (lengths / lengths.std(correction=0)).tanh()
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights], tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe", max_iter=500
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        logits = weights[0] + weights[1] * feature
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, outcomes, reduction="sum")
        loss = loss + weights[1] ** 2 / (2 * 10**2)
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    found = length_controlled_win_rate(outcomes, length_differences=lengths)
    assert found.rate == pytest.approx(float(weights[0].detach().sigmoid()), abs=1e-8)
    assert found.low < found.rate < found.high


def test_a_gain_that_is_length_alone_goes_away() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = 30 + 20 * torch.randn(500, 2, generator=generator)
    outcomes = torch.rand(500, 2, generator=generator).lt((2 * (lengths / lengths.std()).tanh()).sigmoid())
    assert win_rate(outcomes).rate > 0.7
    found = length_controlled_win_rate(outcomes, length_differences=lengths)
    assert found.low < 0.5 < found.high


def test_the_controlled_error_is_that_of_leaving_prompts_out() -> None:
    outcomes, lengths = simulated(80, 4, 3, by_length=1.0)
    left_out = []
    for prompt in range(80):
        kept = torch.arange(80) != prompt
        each = length_controlled_win_rate(outcomes[kept], length_differences=lengths[kept])
        left_out.append(each.rate)
    rates = torch.tensor(left_out, dtype=torch.float64)
    jackknife = math.sqrt(79 / 80 * float((rates - rates.mean()).square().sum()))
    found = length_controlled_win_rate(outcomes, length_differences=lengths)
    assert found.standard_error == pytest.approx(jackknife, rel=0.05)


def test_where_length_decides_all_there_is_still_an_answer() -> None:
    lengths = torch.linspace(-10, 10, 40)[:, None]
    found = length_controlled_win_rate((lengths > 0).double(), length_differences=lengths)
    assert found.rate == pytest.approx(0.5, abs=0.01)
    assert length_controlled_win_rate(torch.ones(40, 1), length_differences=lengths) == win_rate(
        torch.ones(40, 1)
    )


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"`outcomes` must be \(prompts, comparisons\)"):
        win_rate(torch.zeros(3))
    with pytest.raises(ValueError, match="`outcomes` must be from 0 to 1, got nan"):
        win_rate(torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match="`length_differences` must have the shape"):
        length_controlled_win_rate(torch.zeros(3, 1), length_differences=torch.zeros(3))
    assert isinstance(win_rate(torch.zeros(2, 1)), WinRate)
