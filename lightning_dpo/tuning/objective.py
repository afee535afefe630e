"""What a sweep maximises: a metric that means the same at every beta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lightning_dpo.tuning.config_paths import nearest

__all__ = [
    "JUDGED",
    "KL",
    "SCORE",
    "WIN_RATE",
    "Goal",
    "Objective",
    "check_goals",
    "check_logged",
    "pareto_front",
]

KL = "val/kl"
"""The KL between policy and reference, which is shown beside the goals wherever it was measured."""

SCORE = "val/score"
"""What the judge gives the policy's completions, in the mean."""

WIN_RATE = "val/win_rate"
"""Share of prompts for which the judge takes the policy's completion before the reference's."""

JUDGED = (SCORE, WIN_RATE)
"""Metrics of sampled completions, which are known for each completion and not for each pair."""

_LOWER_IS_BETTER = ("loss", "kl", "error")
"""Last words of metrics that nobody means to maximise by naming them alone."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One metric and its direction."""

    metric: str
    mode: Literal["max", "min"]

    @property
    def worst(self) -> float:
        """Value that searchers are told for a trial that went wrong; finite, since not all take infinity.

        Of what may be negative 0 would be a good value: searchers would go where trials go wrong.
        """
        if self.mode == "min":
            return 1e6
        return 0.0 if "accuracy" in self.metric or self.metric.endswith("/auc") else -1e6

    def score(self, value: float) -> float:
        """The value, turned so that more is better."""
        return value if self.mode == "max" else -value


@dataclass(frozen=True, slots=True)
class Objective:
    """One goal or several; the first one ranks trials, all of them make the frontier."""

    goals: tuple[Goal, ...]

    @classmethod
    def parse(cls, value: str | Mapping[str, Any]) -> Objective:
        """Read what stands in YAML.

        Args:
            value: A metric to maximise, or ``{maximize: metric, minimize: metric}``, each one or a list.

        Raises:
            ValueError: If it is neither, or a name alone of what is to be small.
        """
        if isinstance(value, str):
            if value.rpartition("/")[2].removeprefix("val_") in _LOWER_IS_BETTER:
                raise ValueError(
                    f"`objective` maximises a metric that is named alone, got {value!r}: write "
                    f"{{minimize: {value}}}, or {{maximize: {value}}} if the largest is to win"
                )
            return cls((Goal(value, "max"),))
        unknown = [key for key in value if key not in ("maximize", "minimize")]
        if unknown or not value:
            raise ValueError(
                f"`objective` must be a metric's name or {{maximize: ..., minimize: ...}}, got {dict(value)}"
            )
        if not all(isinstance(metrics, str | list | tuple) and metrics for metrics in value.values()):
            raise ValueError(
                f"`objective` must name a metric, or a list of them, for each direction, got {dict(value)}"
            )
        goals = [
            Goal(metric, "max" if key == "maximize" else "min")
            for key, metrics in value.items()
            for metric in ([metrics] if isinstance(metrics, str) else metrics)
        ]
        return cls(tuple(goals))

    @property
    def primary(self) -> Goal:
        """The goal that ranks trials."""
        return self.goals[0]

    @property
    def settings(self) -> tuple[str, ...]:
        """Settings of a sweep without which values of the goals cannot be compared."""
        sampled = ("kl_prompts", "kl_tokens")
        if any(goal.metric in JUDGED for goal in self.goals):
            return ("judge", *sampled)
        return sampled if any(goal.metric == KL for goal in self.goals) else ()

    @property
    def units(self) -> str:
        """What this goal is a mean over: "pairs", or "completions" where these are judged."""
        return "completions" if self.primary.metric in JUDGED else "pairs"

    def shared(self, count: int | None = None) -> str:
        """What trials are compared on, in words: "the same 400 pairs".

        Args:
            count: How many; None leaves the number out.
        """
        number = "" if count is None else f"{count:,} "
        of_prompts = self.primary.metric in JUDGED
        return f"{number}completions of the same prompts" if of_prompts else f"the same {number}pairs"


_NEEDS = {
    KL: "sampled completions: set `kl_prompts`",
    **dict.fromkeys(JUDGED, "sampled completions and who judges them: set `kl_prompts` and `judge`"),
}
"""What settings of a sweep some metrics need."""


def check_goals(
    objective: Objective,
    *,
    metrics: Sequence[str],
    incomparable: Sequence[str] = (),
    varied: Sequence[str] = (),
) -> None:
    """Refuse what is never logged, and what cannot be compared between trials.

    Args:
        objective: The sweep's goals.
        metrics: Names that the module logs.
        incomparable: Names of metrics whose unit depends on the loss and its beta.
        varied: Config paths of the search space.

    Raises:
        ValueError: With the nearest name, or the reason.
    """
    scale = [path for path in varied if path.startswith("model.loss")]
    for goal in objective.goals:
        if goal.metric not in metrics:
            near = f"did you mean {nearest(goal.metric, metrics)!r}?"
            hint = f"it needs {_NEEDS[goal.metric]}" if goal.metric in _NEEDS else near
            if goal.metric == SCORE and WIN_RATE in metrics:
                hint = f"the judge compares two completions and scores none: take {WIN_RATE!r}"
            raise ValueError(
                "`objective` must be a metric that the module logs at validation, got "
                f"{goal.metric!r}; {hint}"
            )
        if scale and goal.metric in incomparable:
            raise ValueError(
                f"`objective` must mean the same in every trial, got {goal.metric!r}: losses and rewards are "
                f"in units of the loss and of beta, and the space varies {', '.join(scale)}. Large values of "
                'beta would win by scale alone. Rank by "val/rewards/accuracy", or by "val/logratio/margin", '
                "which is free of beta"
            )


def check_logged(argument: str, names: Sequence[str], *, metrics: Sequence[str]) -> None:
    """Refuse a metric that is never logged.

    Args:
        argument: Of the sweep's configuration.
        names: Metrics that it names.
        metrics: Names that the module logs.

    Raises:
        ValueError: With the nearest name.
    """
    for name in names:
        if name not in metrics:
            raise ValueError(
                f"`{argument}` must be a metric that the module logs at validation, got {name!r}; did you "
                f"mean {nearest(name, metrics)!r}?"
            )


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other one beats; more is better in each coordinate.

    Of equal points all are kept. In descending order a point can be beaten by earlier ones alone, and by one
    of the front if by any: each is compared with those, and not with all.
    """
    if not points:
        return []
    values = np.asarray(points, dtype=np.float64)
    front: list[int] = []
    for index in np.lexsort(-values.T[::-1]).tolist():
        others, own = values[front], values[index]
        if not ((others >= own).all(axis=1) & (others > own).any(axis=1)).any():
            front.append(index)
    return sorted(front)
