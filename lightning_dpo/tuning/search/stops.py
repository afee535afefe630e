"""What ends a trial or a sweep, other than a scheduler: limits, a hand, and one failure again and again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray import tune

from lightning_dpo.tuning.objective import Goal, Objective
from lightning_dpo.tuning.storage import Storage

__all__ = ["StopRules", "SweepStopper"]

_KEYS = ("steps", "threshold", "plateau")
_SIDES = ("above", "below")
_PLATEAU = {"patience": 3, "min_delta": 0.0}
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class StopRules:
    """When a trial has done enough, looked at with each of its reports.

    Attributes:
        steps: Optimizer steps, or None.
        above: A metric's value at or above which a trial ends, by metric.
        below: A metric's value at or below which it ends.
        patience: Reports in a row without a better value of the first goal, or None.
        min_delta: By how much a value must be better to count.
    """

    steps: int | None = None
    above: Mapping[str, float] = field(default_factory=dict)
    below: Mapping[str, float] = field(default_factory=dict)
    patience: int | None = None
    min_delta: float = 0.0

    @classmethod
    def parse(cls, entries: Mapping[str, Any] | None) -> StopRules:
        """Read what stands in YAML.

        Args:
            entries: Any of ``steps: 500``, ``threshold: {metric: {above: 0.9}}`` (or ``below``), and
                ``plateau: {patience: 3, min_delta: 0.002}``.

        Raises:
            ValueError: If an entry cannot be read.
        """
        given = dict(entries or {})
        unknown = [key for key in given if key not in _KEYS]
        if unknown:
            raise ValueError(f"`stop` takes {', '.join(_KEYS)}, got {unknown[0]!r}")
        steps = given.get("steps")
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"`stop.steps` must be a number of steps, at least 1, got {steps!r}")
        sides: dict[str, dict[str, float]] = {side: {} for side in _SIDES}
        for metric, limit in (given.get("threshold") or {}).items():
            if not isinstance(limit, Mapping) or len(limit) != 1 or next(iter(limit)) not in _SIDES:
                raise ValueError(
                    f"`stop.threshold` of {metric} must be {{above: NUMBER}} or {{below: NUMBER}}, "
                    f"got {limit!r}"
                )
            ((side, value),) = limit.items()
            sides[side][metric] = float(value)
        plateau = given.get("plateau")
        if plateau is None:
            return cls(steps, sides["above"], sides["below"])
        if not isinstance(plateau, Mapping) or set(plateau) - set(_PLATEAU):
            raise ValueError(f"`stop.plateau` must be {{patience: 3, min_delta: 0.0}}, got {plateau!r}")
        filled = {**_PLATEAU, **plateau}
        if filled["patience"] < 1 or filled["min_delta"] < 0:
            raise ValueError(
                f"`stop.plateau` needs a patience of at least 1 and no negative min_delta, got {filled}"
            )
        return cls(steps, sides["above"], sides["below"], int(filled["patience"]), float(filled["min_delta"]))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that thresholds are set for."""
        return (*self.above, *self.below)

    def ends(self, result: Mapping[str, Any], history: list[float], goal: Goal) -> bool:
        """Whether a trial has done enough.

        Args:
            result: Its report.
            history: The first goal's value at each of its reports, this one last.
            goal: The first goal.
        """
        if self.steps is not None and result.get("step", 0) >= self.steps:
            return True
        if any(metric in result and result[metric] >= limit for metric, limit in self.above.items()):
            return True
        if any(metric in result and result[metric] <= limit for metric, limit in self.below.items()):
            return True
        if self.patience is None or len(history) <= self.patience:
            return False
        scores = [goal.score(value) for value in history]
        before = max(scores[: -self.patience])
        return max(scores[-self.patience :]) <= before + self.min_delta


class SweepStopper(tune.Stopper):
    """Ends trials by `stop` or by hand, and the sweep where its first trials all fail alike.

    A trial ends by hand with a file of its id, or of the five digits that the table shows, in the sweep's
    folder `stop`; what it has reported counts, as that of a trial that a scheduler stopped.
    """

    def __init__(self, rules: StopRules, *, objective: Objective, location: str, fail_fast: int) -> None:
        """Say what ends a trial.

        Args:
            rules: The sweep's `stop`.
            objective: The sweep's goals.
            location: The sweep's folder.
            fail_fast: So many trials that fail alike before any reported end the sweep; 0 never ends it.
        """
        self._rules = rules
        self._goal = objective.primary
        self._location = location
        self._fail_fast = fail_fast
        self._values: dict[str, list[float]] = {}
        self._failures: dict[str, str] = {}
        self._has_result = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether a trial ends with this report."""
        status = result.get("status")
        if status in ("failed", "out of memory"):
            self._failures[trial_id] = _NUMBER.sub("#", str(result.get("reason", "")))
        if status is not None:
            return True  # it has ended: a scheduler that pauses trials would start it again and again
        if "step" not in result:
            return False
        self._has_result = True
        values = self._values.setdefault(trial_id, [])
        values.append(float(result[self._goal.metric]))
        return self._rules.ends(result, values, self._goal) or self._is_stopped_by_hand(trial_id)

    def stop_all(self) -> bool:
        """Whether the sweep ends: nothing but the same failure came of its first trials."""
        if not self._fail_fast or self._has_result or len(self._failures) < self._fail_fast:
            return False
        return len(set(self._failures.values())) == 1

    def _is_stopped_by_hand(self, trial_id: str) -> bool:
        names = (Storage(self._location) / "stop").names("")
        return trial_id in names or trial_id[-5:] in names
