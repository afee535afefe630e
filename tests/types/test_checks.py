from __future__ import annotations

from typing import Any

import pytest

from lightning_dpo.types.checks import check_bounds


def test_numbers_within_their_range_pass() -> None:
    check_bounds(least=0, most=1, a=0.0, b=1, c=None)
    check_bounds(above=0, a=1e-9, b=float("inf"))


@pytest.mark.parametrize(
    ("bounds", "value", "said"),
    [
        ({"least": 1}, 0, "`n` must be at least 1, got 0"),
        ({"above": 0}, 0.0, "`n` must be above 0, got 0.0"),
        ({"above": 0, "most": 1}, 1.5, "`n` must be above 0 and at most 1, got 1.5"),
        (
            {"least": 2, "unit": " steps", "hint": "; leave it out"},
            1,
            "at least 2 steps, got 1; leave",
        ),
        ({"least": 0}, float("nan"), "`n` must be at least 0, got nan"),
    ],
)
def test_one_out_of_it_is_named(bounds: dict[str, Any], value: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_bounds(**bounds, n=value)
