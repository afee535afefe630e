"""Which trials can be told from the best one, given what each found for every validation pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_dpo.tuning.objective import Goal
from lightning_dpo.tuning.results.paired import Interval, mean_interval, paired_difference
from lightning_dpo.tuning.trial.outcomes import PairOutcomes

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A trial beside the best one, by the first goal, on the same validation pairs.

    Attributes:
        pairs: How many pairs both were validated on.
        runs: How often the trial's values were run, each time with another seed.
        mean: The metric, a mean over pairs and runs.
        interval: Its confidence interval.
        difference: The trial's mean less the best one's.
        difference_interval: Its confidence interval.
        p_value: Probability of a difference as large, were there none; two-sided, of this comparison alone.
        is_level: Whether the trial cannot be told from the best one.
    """

    pairs: int
    runs: int
    mean: float
    interval: Interval
    difference: float
    difference_interval: Interval
    p_value: float
    is_level: bool

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Comparison:
        """Read what `dataclasses.asdict` gave."""
        intervals = {name: Interval(*fields[name]) for name in ("interval", "difference_interval")}
        return cls(**{**fields, **intervals})


def compare(
    outcomes: Mapping[str, Sequence[PairOutcomes]], *, goal: Goal, confidence: float
) -> dict[str, Comparison]:
    """Compare trials with the best of them.

    A trial can be told from the best one if its p-value is below 1 - confidence. Of many trials that are as
    good some then look worse by chance; to correct for their number would call a trial as good as the best
    one although its interval says that it is worse.

    Where values were run with several seeds, the variance between the seeds, pooled over all trials that were
    repeated, is part of every interval and p-value, which are Student's since it is known from few runs; else
    they tell of the choice of pairs alone.

    Args:
        outcomes: What each trial's runs found, best trial first; trials of other pairs than the best one's
            are left out.
        goal: What the pairs' values are; a higher or a lower mean is better.
        confidence: Such as 0.95.

    Returns:
        A comparison for each trial that can be compared; none where there are no outcomes.
    """
    if not outcomes:
        return {}
    first = next(iter(outcomes.values()))[0]
    runs = {
        trial: [run for run in found if np.array_equal(run.keys, first.keys)]
        for trial, found in outcomes.items()
    }
    runs = {trial: found for trial, found in runs.items() if found}
    means = {trial: np.mean([run.values for run in found], axis=0) for trial, found in runs.items()}
    weights = first.weights
    variance, freedom = _variance_between_seeds([[run.mean for run in found] for found in runs.values()])
    best = next(iter(runs))
    compared = {}
    for trial, values in means.items():
        own, best_one = variance / len(runs[trial]), variance / len(runs[best])
        difference = paired_difference(
            values,
            means[best],
            weights=weights,
            confidence=confidence,
            extra_error=0.0 if trial == best else math.sqrt(own + best_one),
            extra_freedom=freedom,
        )
        is_better = goal.score(difference.mean) >= 0
        compared[trial] = Comparison(
            pairs=len(values),
            runs=len(runs[trial]),
            mean=float(np.average(values, weights=weights)),
            interval=mean_interval(
                values,
                weights=weights,
                confidence=confidence,
                extra_error=math.sqrt(own),
                extra_freedom=freedom,
            ),
            difference=difference.mean,
            difference_interval=difference.interval if trial != best else Interval(0.0, 0.0),
            p_value=difference.p_value,
            is_level=is_better or difference.p_value >= 1 - confidence,
        )
    return compared


def _variance_between_seeds(means: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Variance of a run's mean over seeds, pooled over trials, and its degrees of freedom.

    The variance is 0 where nothing was run twice.
    """
    repeated = [np.asarray(found) for found in means if len(found) > 1]
    if not repeated:
        return 0.0, math.inf
    squares = sum(float(((found - found.mean()) ** 2).sum()) for found in repeated)
    freedom = sum(len(found) - 1 for found in repeated)
    return squares / freedom, float(freedom)
