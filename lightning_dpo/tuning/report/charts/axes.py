"""Axes of the report's charts: where they are logarithmic, and ticks that a reader knows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_dpo.tuning.report.formatting import format_number

__all__ = ["axis", "is_logarithmic", "layout", "ticks"]

_SPAN = 8
"""Values that lie further apart than this ratio are drawn on a logarithmic axis."""


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether values are all positive, finite and span about a decade or more."""
    if not values or not all(map(math.isfinite, values)):
        return False
    return min(values) > 0 and max(values) / min(values) > _SPAN


def ticks(low: float, high: float) -> list[float]:
    """Round values of a logarithmic axis from low to high: at most about eight of them."""
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades <= 2 else (1, 3) if decades <= 4 else (1,)
    every = 1 if decades <= 8 else 2
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, every)
    # A tick at the end of the axis must not be lost to rounding.
    slack = 1 + 1e-9
    found = [step * 10.0**power for power in powers for step in steps]
    return [tick for tick in found if low / slack <= tick <= high * slack]


def axis(title: str, values: Sequence[float], *, margin: float = 0.06) -> dict[str, Any]:
    """An axis for plotly, logarithmic where the values span about a decade or more.

    Args:
        title: What the axis shows.
        values: What must lie on a logarithmic axis; plotly finds the ends of a linear one.
        margin: Share of a logarithmic axis left free at each end.
    """
    common = {"title": {"text": title, "standoff": 8}, "automargin": True, "zeroline": False}
    if not is_logarithmic(values):
        return common
    low, high = math.log10(min(values)), math.log10(max(values))
    free = (high - low) * margin
    places = ticks(10 ** (low - free), 10 ** (high + free))
    return {
        **common,
        "type": "log",
        "range": [low - free, high + free],
        "tickmode": "array",
        "tickvals": places,
        "ticktext": [format_number(place, 1) for place in places],
        "tickangle": 0,
    }


def layout(across: dict[str, Any], up: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The layout that all charts with two axes share: the legend lies above, in a row."""
    return {
        "xaxis": across,
        "yaxis": up,
        "margin": {"l": 8, "r": 12, "t": 44, "b": 8},
        "legend": {
            "orientation": "h",
            "traceorder": "normal",
            "x": 0,
            "y": 1.02,
            "xanchor": "left",
            "yanchor": "bottom",
        },
        "hovermode": "closest",
        **changes,
    }
