"""How sure a mean over pairs is, and the difference of two trials that were validated on the same pairs."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_dpo.evaluation.student import student_p_value, student_quantile

__all__ = ["Interval", "mcnemar_p_value", "mean_interval", "paired_difference", "sign_flip_p_value"]

_DRAWS = 9999
_CHUNK = 2048


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """A paired difference of two means.

    Attributes:
        mean: Weighted mean of the differences.
        error: Its standard error, over the choice of pairs.
        interval: Its confidence interval.
        p_value: Probability of a difference as large, were there none; two-sided.
    """

    mean: float
    error: float
    interval: Interval
    p_value: float


def mean_interval(
    values: NDArray[np.float64],
    *,
    weights: NDArray[np.float64],
    confidence: float,
    extra_error: float = 0.0,
    extra_freedom: float = math.inf,
) -> Interval:
    """The interval of a weighted mean.

    Wilson's for shares, values from 0 to 1 (https://doi.org/10.1080/01621459.1927.10502953), with the
    effective number of pairs (sum w)^2 / sum w^2; mean and standard error for others.

    Args:
        values: One for each pair, (pairs,).
        weights: What each counts, (pairs,).
        confidence: Such as 0.95.
        extra_error: Standard error from elsewhere, such as the choice of the seed.
        extra_freedom: Degrees of freedom that it is known with.
    """
    mean = float(np.average(values, weights=weights))
    own_error = _standard_error(values, weights)
    error = math.hypot(own_error, extra_error)
    freedom = _freedom(own_error, len(values), extra_error, extra_freedom)
    z = student_quantile(confidence, freedom=freedom)
    if values.min() < 0 or values.max() > 1:
        return Interval(mean - z * error, mean + z * error)
    count = float(weights.sum() ** 2 / (weights**2).sum())
    if extra_error:
        # As many pairs as would make the sampling error alone this large.
        count = min(count, max(mean * (1 - mean) / error**2, 1.0)) if 0 < mean < 1 else count
    scale = 1 + z**2 / count
    centre = (mean + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    return Interval(max(centre - half, 0.0), min(centre + half, 1.0))


def paired_difference(
    values: NDArray[np.float64],
    others: NDArray[np.float64],
    *,
    weights: NDArray[np.float64],
    confidence: float,
    extra_error: float = 0.0,
    extra_freedom: float = math.inf,
) -> Difference:
    """The mean of `values` less that of `others`, on the same pairs.

    Where each pair counts the same and is right or wrong, the p-value is McNemar's exact one, and the
    interval is that of Agresti and Min (https://doi.org/10.1002/sim.1781): half a pair is added to each of
    the four cells, without which it would have no width where no pair differs. Else signs of differences are
    flipped at random, and the interval is the mean with its standard error.

    Args:
        values: One for each pair, (pairs,).
        others: The other trial's, (pairs,).
        weights: What each pair counts, (pairs,).
        confidence: Such as 0.95.
        extra_error: Standard error from elsewhere, such as the choice of the seed. Where there is some, the
            p-value is Student's of the difference over both errors.
        extra_freedom: Degrees of freedom that it is known with.
    """
    differences = values - others
    mean = float(np.average(differences, weights=weights))
    error = _standard_error(differences, weights)
    freedom = _freedom(error, len(values), extra_error, extra_freedom)
    z = student_quantile(confidence, freedom=freedom)
    binary = bool(np.isin(values, (0, 1)).all() and np.isin(others, (0, 1)).all())
    centre, half = mean, z * math.hypot(error, extra_error)
    if binary and (weights == weights[0]).all():
        count = len(values) + 2
        better, worse = float((differences > 0).sum()), float((differences < 0).sum())
        centre = (better - worse) / count
        cells = (better + worse + 1) / count - centre**2
        half = z * math.hypot(math.sqrt(cells / count), extra_error)
        p_value = mcnemar_p_value(int(better), int(worse))
    elif not extra_error:
        p_value = sign_flip_p_value(differences, weights=weights)
    if extra_error:
        p_value = student_p_value(mean / math.hypot(error, extra_error), freedom=freedom)
    low, high = centre - half, centre + half
    # A share differs by 1 at most.
    interval = Interval(max(low, -1.0), min(high, 1.0)) if binary else Interval(low, high)
    return Difference(mean, error, interval, p_value)


def mcnemar_p_value(better: int, worse: int) -> float:
    """McNemar's exact test: two-sided, of pairs that one trial alone has right.

    Args:
        better: Pairs that only the one trial has right.
        worse: Pairs that only the other one has right.
    """
    count, few = better + worse, min(better, worse)
    # In logarithms: 2^-n is below the smallest float from n = 1075 on.
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(few + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def sign_flip_p_value(differences: NDArray[np.float64], *, weights: NDArray[np.float64]) -> float:
    """A randomisation test of paired differences: two-sided, were the sign of each a matter of chance.

    Args:
        differences: One for each pair, (pairs,).
        weights: What each counts, (pairs,).
    """
    terms = (differences * weights)[differences != 0]
    if not len(terms):
        return 1.0
    random = np.random.default_rng(0)
    sums = np.zeros(_DRAWS)
    for start in range(0, len(terms), _CHUNK):
        part = terms[start : start + _CHUNK]
        sums += (2 * random.integers(0, 2, (_DRAWS, len(part)), dtype=np.int8) - 1) @ part
    observed = abs(terms.sum())
    # A sum that is equal but for rounding counts as at least as large.
    extreme = int((np.abs(sums) >= observed * (1 - 1e-9)).sum())
    return (extreme + 1) / (_DRAWS + 1)


def _freedom(error: float, count: int, extra_error: float, extra_freedom: float) -> float:
    """Degrees of freedom of two errors together (Satterthwaite, https://doi.org/10.2307/3002019).

    Infinite where there is no error but that of pairs.
    """
    if not extra_error:
        return math.inf
    parts = extra_error**4 / extra_freedom + error**4 / max(count - 1, 1)
    return math.hypot(error, extra_error) ** 4 / parts if parts else math.inf


def _standard_error(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Standard error of a weighted mean over the choice of pairs."""
    if len(values) < 2:
        return 0.0
    centred = values - np.average(values, weights=weights)
    factor = len(values) / (len(values) - 1)
    return math.sqrt(factor * float((weights**2 * centred**2).sum())) / float(weights.sum())
