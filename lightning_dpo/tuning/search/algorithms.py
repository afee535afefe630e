"""Searchers and schedulers, by short name or class path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search.sample import Domain

from lightning_dpo.tuning.objective import Objective
from lightning_dpo.tuning.search.space import SearchSpace, import_object, is_known_to_optuna

__all__ = ["make_scheduler", "make_searcher"]

# These two of Ray's schedulers count seconds unless they are told otherwise.
_BY_REPORT = {"time_attr": "training_iteration"}

_SCHEDULERS: dict[str, tuple[type[TrialScheduler], dict[str, Any]]] = {
    "none": (FIFOScheduler, {}),
    # The recipe says how long a trial is: `max_t` is out of the way unless it is set.
    "asha": (AsyncHyperBandScheduler, {"max_t": 1_000_000, "grace_period": 1, "reduction_factor": 3}),
    "hyperband": (HyperBandScheduler, {"max_t": 27}),
    "median": (MedianStoppingRule, {**_BY_REPORT, "grace_period": 2, "min_samples_required": 3}),
    "pbt": (PopulationBasedTraining, {**_BY_REPORT, "perturbation_interval": 2}),
}


def make_searcher(
    choice: str | Mapping[str, Any],
    *,
    space: SearchSpace,
    objective: Objective,
    seed: int,
    concurrency: int = 0,
) -> Any:
    """The searcher.

    Args:
        choice: "random", "grid", "optuna", or ``{class_path: ..., init_args: ...}``.
        space: What varies.
        objective: One goal or several.
        seed: Of the search.
        concurrency: Trials at once, where the searcher itself must know; Tune limits the others.

    Raises:
        ValueError: If the searcher does not take the space or several goals.
    """
    name, arguments = _split(choice)
    if name in ("random", "grid"):
        if name == "grid" and any(p.domain is not None for p in space.parameters):
            drawn = [p.path for p in space.parameters if p.domain is not None]
            raise ValueError(
                f'`search="grid"` needs every path as {{grid: [...]}}, got {", ".join(drawn)} drawn'
            )
        return tune.search.BasicVariantGenerator(random_state=seed, max_concurrent=concurrency, **arguments)
    if name == "optuna":
        return _optuna(space, objective, {"seed": seed, **arguments})
    if space.grid:
        raise ValueError(f"`search` {name} takes no grid, got {space.grid[0].path}; use choice in its place")
    cls = import_object(name)
    if len(objective.goals) > 1:
        raise ValueError(f'several goals need `search="optuna"`, got {name}')
    goal = objective.primary
    return cls(metric=goal.metric, mode=goal.mode, **arguments)


def make_scheduler(
    choice: str | Mapping[str, Any], *, space: SearchSpace, objective: Objective
) -> TrialScheduler:
    """The scheduler, ranking by the first goal.

    Args:
        choice: One of the short names, alone or as ``class_path``, or any Ray scheduler's path.
        space: What PBT may change.
        objective: One goal or several.

    Raises:
        ValueError: If it cannot be imported or does not take its arguments.
    """
    name, arguments = _split(choice)
    cls, defaults = _SCHEDULERS.get(name, (None, {}))
    cls = cls or import_object(name)
    if cls is PopulationBasedTraining and "hyperparam_mutations" not in arguments:
        defaults = {**defaults, "hyperparam_mutations": _mutations(space)}
    if len(objective.goals) > 1 and cls is not FIFOScheduler:
        defaults = {**defaults, "metric": objective.primary.metric, "mode": objective.primary.mode}
    try:
        return cls(**{**defaults, **arguments})
    except TypeError as error:
        raise ValueError(f"`scheduler` {name} does not take {arguments}: {error}") from error


def _optuna(space: SearchSpace, objective: Objective, arguments: dict[str, Any]) -> Any:
    from ray.tune.search.optuna import OptunaSearch

    unknown = [p for p in space.parameters if not is_known_to_optuna(p)]
    if unknown:
        raise ValueError(
            f'`search="optuna"` has no {unknown[0].kind} for {unknown[0].path}; use another domain'
        )
    goals = objective.goals
    single = len(goals) == 1
    return OptunaSearch(
        space=space.define_by_run,
        metric=goals[0].metric if single else [goal.metric for goal in goals],
        mode=goals[0].mode if single else [goal.mode for goal in goals],
        **arguments,
    )


def _mutations(space: SearchSpace) -> dict[str, Any]:
    found = {p.key: p.domain for p in space.parameters if isinstance(p.domain, Domain) and not p.when}
    if not found:
        raise ValueError('`scheduler="pbt"` needs a path that is drawn from a range or a choice, got none')
    return found


def _split(choice: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(choice, str):
        return choice, {}
    if "class_path" not in choice or set(choice) - {"class_path", "init_args"}:
        raise ValueError(
            f"a searcher or scheduler must be a name or {{class_path, init_args}}, got {dict(choice)}"
        )
    return str(choice["class_path"]), dict(choice.get("init_args") or {})
