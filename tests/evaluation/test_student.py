from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from lightning_dpo.evaluation.student import student_p_value, student_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (10, 2.2281), (99, 1.9842)]
)
def test_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(0.95, freedom=freedom) == pytest.approx(quantile, rel=2e-5)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 40.0])
def test_probabilities_are_those_of_the_closed_forms(t: float) -> None:
    assert student_p_value(t, freedom=1) == pytest.approx(1 - 2 / math.pi * math.atan(t))
    assert student_p_value(-t, freedom=2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)


@pytest.mark.parametrize("freedom", [1.5, 3.7, 48.2, 3000.0])
def test_probabilities_are_the_integral_of_the_density(freedom: float) -> None:
    # t = sqrt(freedom) tan(angle) makes it the integral of cos^(freedom - 1), which is finite.
    angles = np.linspace(0, math.pi / 2, 2_000_001)
    heights = np.cos(angles) ** (freedom - 1)
    beyond = angles >= math.atan(1.7 / math.sqrt(freedom))
    expected = heights[beyond].sum() / heights.sum()
    assert student_p_value(1.7, freedom=freedom) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.999])
def test_the_quantile_is_where_the_probability_is_what_is_left(confidence: float) -> None:
    for freedom in (1, 2.5, 7, 400, 1e5):
        reach = student_quantile(confidence, freedom=freedom)
        assert student_p_value(reach, freedom=freedom) == pytest.approx(1 - confidence, rel=1e-9)


def test_many_degrees_of_freedom_are_the_normal_distribution() -> None:
    normal = NormalDist().inv_cdf(0.975)
    assert student_quantile(0.95, freedom=math.inf) == normal
    assert student_quantile(0.95, freedom=9.9e4) == pytest.approx(normal, rel=1e-4)
    assert student_p_value(2.0, freedom=math.inf) == pytest.approx(0.04550026)
