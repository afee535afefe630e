from __future__ import annotations

import pytest

from lightning_dpo.tuning.report.charts.axes import axis, is_logarithmic, ticks


def test_ticks_are_round() -> None:
    assert ticks(0.01, 0.5) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    assert ticks(1e-6, 1e-3) == pytest.approx([1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3])
    assert ticks(1e-6, 1) == pytest.approx([10.0**power for power in range(-6, 1)])


def test_the_ticks_say_what_they_are() -> None:
    texts = ["1e-6", "2e-6", "5e-6", "1e-5", "2e-5", "5e-5", "1e-4"]
    assert axis("lr", [1e-6, 1e-4], margin=0)["ticktext"] == texts


def test_values_that_are_not_positive_stay_linear() -> None:
    assert is_logarithmic([0.001, 1])
    assert not is_logarithmic([0.0, 1])
    assert not is_logarithmic([1.0, 2.0])
    assert "type" not in axis("steps", [])
