"""Student's t: how sure a mean is whose standard error is itself known from few values."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["student_p_value", "student_quantile"]

_AS_GOOD_AS_NORMAL = 1e5
"""Degrees of freedom from which on the normal distribution is taken: its quantiles are the same to 1e-4."""


def student_p_value(t: float, *, freedom: float) -> float:
    """Probability that |T| is at least |t|.

    Args:
        t: A difference over its standard error.
        freedom: Degrees of freedom, above 0; need not be whole.
    """
    if freedom > _AS_GOOD_AS_NORMAL:
        return 2 * NormalDist().cdf(-abs(t))
    return _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def student_quantile(confidence: float, *, freedom: float) -> float:
    """How many standard errors an interval reaches to each side.

    Args:
        confidence: Such as 0.95.
        freedom: Degrees of freedom, above 0; need not be whole.
    """
    found = NormalDist().inv_cdf(0.5 + confidence / 2)
    if freedom > _AS_GOOD_AS_NORMAL:
        return found
    half = freedom / 2
    log_scale = math.lgamma(half + 0.5) - math.lgamma(half) - math.log(freedom * math.pi) / 2
    # Newton's method: the probability falls and is convex, so from the left it never goes too far.
    for _ in range(100):
        excess = student_p_value(found, freedom=freedom) - (1 - confidence)
        density = math.exp(log_scale - (half + 0.5) * math.log1p(found**2 / freedom))
        step = excess / (2 * density)
        found += step
        if abs(step) <= 1e-12 * found:
            break
    return found


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function by its continued fraction, https://dlmf.nist.gov/8.17.E22."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    fraction = 1.0
    for m in range(20 + 3 * math.isqrt(int(a + b) + 1), 0, -1):
        even = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1))
        fraction = 1 + even * x / (1 + odd * x / fraction)
    fraction = 1 - (a + b) / (a + 1) * x / fraction
    logs = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(logs) / (a * fraction)
