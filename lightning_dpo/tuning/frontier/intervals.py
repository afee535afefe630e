"""A mean over a few seeds, and how far the mean of many may be from it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from lightning_dpo.evaluation.student import student_quantile

__all__ = ["Interval"]


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval by Student's t.

    Attributes:
        mean: The mean.
        half_width: The interval is mean - half_width to mean + half_width; NaN for a single value.
        values: How many values there were.
    """

    mean: float
    half_width: float
    values: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval | None:
        """Mean and interval of values; None where there are none."""
        if not values:
            return None
        mean = statistics.fmean(values)
        if len(values) == 1:
            return cls(mean, math.nan, 1)
        quantile = student_quantile(0.95, freedom=len(values) - 1)
        error = statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, quantile * error, len(values))
