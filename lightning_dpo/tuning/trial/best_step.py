"""Which step of a trial is its best one: one half of the validation pairs chooses it, the other measures it.

The largest of k validations is too large on average: where all steps are equally good and each errs by s on
its own, by c_k s, with c_k the mean of the largest of k standard normal numbers (0.56, 1.03, 1.42, 1.77 for
k = 2, 4, 8, 16). With 400 pairs and an accuracy of 0.7 that is 0.033 for k = 8, more than most trials differ
by. What a step was chosen for says nothing of the pairs that took no part in the choice: these rank trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_dpo.tuning.objective import Goal
from lightning_dpo.tuning.trial.outcomes import PairOutcomes

__all__ = ["BestStep", "KeptStep", "chooses", "ranking_half"]


@dataclass(frozen=True, slots=True)
class KeptStep:
    """The step of a trial whose weights are kept.

    Attributes:
        step: Optimizer steps.
        metric: The first goal's metric.
        choosing: Its mean over the pairs that the step was chosen on, which is too good on average.
        ranking: Its mean over the other pairs, which is not.
        choosing_pairs: Number of pairs that the step was chosen on.
        ranking_pairs: Number of the others.
        folder: Name of the checkpoint's folder.
        report: All that was reported at the step, over all pairs.
    """

    step: int
    metric: str
    choosing: float
    ranking: float
    choosing_pairs: int
    ranking_pairs: int
    folder: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Any]:
        """What was reported at the step, with the first goal's metric over the pairs that rank trials."""
        return {**self.report, self.metric: self.ranking}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class BestStep:
    """Follows a trial's validations, and says at each whether it is the best one so far."""

    def __init__(self, goal: Goal, *, kept: KeptStep | None = None) -> None:
        """Begin, or go on.

        Args:
            goal: The first goal.
            kept: The best step that is known of an earlier start of the trial.
        """
        self._goal = goal
        self.kept = kept

    def consider(
        self,
        outcomes: PairOutcomes | None,
        report: Mapping[str, Any],
        *,
        total: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> bool:
        """Take over a validation if it is better than all before; of equal ones the first is kept.

        Args:
            outcomes: What it found for each pair that this rank saw; None where this rank saw none.
            report: What is reported of it.
            total: Sums a tensor over all ranks.

        Raises:
            ValueError: If nothing was found for the pairs of one half, on any rank.
        """
        sums = torch.zeros(6, dtype=torch.float64)
        if outcomes is not None:
            chosen = chooses(outcomes.keys)
            for place, mask in ((0, chosen), (3, ~chosen)):
                values, weights = outcomes.values[mask], outcomes.weights[mask]
                found = [float((values * weights).sum()), float(weights.sum()), float(mask.sum())]
                sums[place : place + 3] = torch.tensor(found)
        first, first_weight, first_pairs, second, second_weight, second_pairs = total(sums).tolist()
        if not first_weight or not second_weight:
            raise ValueError(
                f"`keep: best` needs {self._goal.metric} of each of some validation pairs, got "
                f"{int(first_pairs + second_pairs)}: one half chooses the step, and the other one ranks the "
                "trial. Validate on more pairs, take an objective that is measured pair by pair, such as "
                "val/rewards/accuracy of DPOModule, or keep: last"
            )
        choosing = first / first_weight
        if self.kept is not None and self._goal.score(choosing) <= self._goal.score(self.kept.choosing):
            return False
        self.kept = KeptStep(
            step=int(report["step"]),
            metric=self._goal.metric,
            choosing=choosing,
            ranking=second / second_weight,
            choosing_pairs=int(first_pairs),
            ranking_pairs=int(second_pairs),
            report=dict(report),
        )
        return True


def chooses(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which pairs choose the step: a half by chance that is the same in all trials, on any number of ranks.

    Args:
        keys: As `pair_keys` gives them, (pairs,).
    """
    chosen: NDArray[np.bool_] = (keys & np.uint64(1)) == 0
    return chosen


def ranking_half(outcomes: PairOutcomes) -> PairOutcomes:
    """The outcomes of the pairs that take no part in the choice of a step."""
    kept = ~chooses(outcomes.keys)
    return PairOutcomes(outcomes.keys[kept], outcomes.values[kept], outcomes.weights[kept], outcomes.step)
