"""Intervals and tests of paired means, against enumeration and published values."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import comb

import numpy as np
import pytest

from lightning_dpo.tuning.results.paired import (
    mcnemar_p_value,
    mean_interval,
    paired_difference,
    sign_flip_p_value,
)


def ones(count: int) -> np.ndarray:
    return np.ones(count)


def shares(right: int, count: int) -> np.ndarray:
    return (np.arange(count) < right).astype(float)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(right: int, count: int, low: float, high: float) -> None:
    interval = mean_interval(shares(right, count), weights=ones(count), confidence=0.95)
    assert interval == pytest.approx((low, high), abs=6e-5)


def test_weights_count_as_their_effective_number() -> None:
    doubled = mean_interval(shares(3, 10), weights=np.full(10, 2.0), confidence=0.95)
    assert doubled == pytest.approx(mean_interval(shares(3, 10), weights=ones(10), confidence=0.95))
    uneven = mean_interval(shares(3, 10), weights=np.arange(1.0, 11.0), confidence=0.95)
    assert uneven.high - uneven.low > 0


def test_other_metrics_have_mean_and_standard_error() -> None:
    values = np.array([-1.0, 2.0, 5.0])
    error = values.std(ddof=1) / np.sqrt(3)
    interval = mean_interval(values, weights=ones(3), confidence=0.95)
    assert interval == pytest.approx((2 - 1.959964 * error, 2 + 1.959964 * error))


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 0), (7, 2), (3, 3), (30, 12)])
def test_mcnemar_is_the_binomial_test(better: int, worse: int) -> None:
    count = better + worse
    extreme = sum(comb(count, k) for k in range(count + 1) if abs(2 * k - count) >= abs(better - worse))
    assert mcnemar_p_value(better, worse) == pytest.approx(float(Fraction(extreme, 2**count)))


def test_mcnemar_of_many_pairs_does_not_underflow() -> None:
    assert mcnemar_p_value(1500, 1500) == 1.0
    assert 0 <= mcnemar_p_value(0, 3000) < 1e-300
    assert mcnemar_p_value(1040, 960) == pytest.approx(0.0771, abs=2e-4)


def test_sign_flips_as_enumerated() -> None:
    differences = np.array([0.3, -0.1, 0.7, 0.2, -0.4, 0.9, 0.0])
    weights = np.array([1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 3.0])
    terms = differences * weights
    sums = [abs(np.dot(signs, terms)) for signs in itertools.product((-1, 1), repeat=7)]
    exact = np.mean([one >= abs(terms.sum()) - 1e-12 for one in sums])
    assert sign_flip_p_value(differences, weights=weights) == pytest.approx(exact, abs=0.02)
    assert sign_flip_p_value(np.zeros(5), weights=ones(5)) == 1.0


def test_the_difference_of_two_trials_by_hand() -> None:
    # Both right 50, first alone 12, second alone 4, neither 34: Agresti and Min add half to each cell.
    first = np.repeat([1.0, 1.0, 0.0, 0.0], [50, 12, 4, 34])
    second = np.repeat([1.0, 0.0, 1.0, 0.0], [50, 12, 4, 34])
    found = paired_difference(first, second, weights=ones(100), confidence=0.95)
    assert found.mean == pytest.approx(0.08)
    centre, error = 8 / 102, np.sqrt((17 / 102 - (8 / 102) ** 2) / 102)
    assert found.interval == pytest.approx((centre - 1.959964 * error, centre + 1.959964 * error))
    assert found.p_value == pytest.approx(mcnemar_p_value(12, 4))


def test_a_seed_widens_everything() -> None:
    first, second = shares(70, 100), shares(60, 100)
    alone = paired_difference(first, second, weights=ones(100), confidence=0.95)
    with_seed = paired_difference(first, second, weights=ones(100), confidence=0.95, extra_error=0.05)
    assert with_seed.p_value > alone.p_value
    assert with_seed.interval.low < alone.interval.low
    narrow = mean_interval(first, weights=ones(100), confidence=0.95)
    wide = mean_interval(first, weights=ones(100), confidence=0.95, extra_error=0.05)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    held, sure = 0, 0
    for _ in range(500):
        skill = random.uniform(size=200)
        first, second = (((skill + shift) > random.uniform(size=200)).astype(float) for shift in (0.0, -0.1))
        truth = np.clip(skill, 0, 1).mean() - np.clip(skill - 0.1, 0, 1).mean()
        found = paired_difference(first, second, weights=ones(200), confidence=0.9)
        held += found.interval.low <= truth <= found.interval.high
        same = (skill > random.uniform(size=200)).astype(float)
        sure += paired_difference(first, same, weights=ones(200), confidence=0.9).p_value < 0.1
    assert held / 500 >= 0.88
    assert sure / 500 <= 0.12


@pytest.mark.parametrize("right", [0, 8])
def test_a_mean_at_the_end_has_an_interval_with_seeds_too(right: int) -> None:
    interval = mean_interval(shares(right, 8), weights=ones(8), confidence=0.95, extra_error=0.1)
    assert 0 <= interval.low < interval.high <= 1
