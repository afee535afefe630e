"""Searchers, which choose the values of trials: by short name or class path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune

from lightning_dpo.tuning.config_paths import class_and_arguments, import_object
from lightning_dpo.tuning.objective import Objective
from lightning_dpo.tuning.search.space import SearchSpace, is_known_to_optuna

__all__ = ["draws_by_itself", "make_searcher"]


def make_searcher(
    choice: str | Mapping[str, Any],
    *,
    space: SearchSpace,
    objective: Objective,
    seed: int,
) -> Any:
    """The searcher.

    Args:
        choice: "random", "grid", "optuna", or ``{class_path: ..., init_args: ...}``.
        space: What varies.
        objective: One goal or several.
        seed: Seed of the search.

    Raises:
        ValueError: If the searcher does not take the space or several goals.
    """
    name, arguments = class_and_arguments(choice)
    if name in ("random", "grid"):
        if name == "grid" and any(p.domain is not None for p in space.parameters):
            drawn = [p.path for p in space.parameters if p.domain is not None]
            raise ValueError(
                f'`search="grid"` needs every path as {{grid: [...]}}, got {", ".join(drawn)} drawn'
            )
        return tune.search.BasicVariantGenerator(random_state=seed, **arguments)
    if name == "optuna":
        return _optuna(space, objective, {"seed": seed, **arguments})
    if "." not in name:
        raise ValueError(
            "`search` must be one of random, grid, optuna or importable as package.module.Class, got "
            f"{name!r}"
        )
    if space.grid:
        raise ValueError(f"`search` {name} takes no grid, got {space.grid[0].path}; use choice in its place")
    cls = import_object(name)
    if len(objective.goals) > 1:
        raise ValueError(f'several goals need `search="optuna"`, got {name}')
    goal = objective.primary
    return cls(metric=goal.metric, mode=goal.mode, **arguments)


def draws_by_itself(choice: str | Mapping[str, Any]) -> bool:
    """Whether the searcher was given the space, and draws each point of it in one go.

    Args:
        choice: As `make_searcher` takes it.
    """
    return class_and_arguments(choice)[0] == "optuna"


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
