"""Searchers, which choose the values of trials: by short name or class path."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from lightning_dpo.tuning.config_paths import class_and_arguments, import_object
from lightning_dpo.tuning.objective import Objective
from lightning_dpo.tuning.search.plain import PlainSearch
from lightning_dpo.tuning.search.space import GRID_KEY, SearchSpace, is_known_to_optuna
from lightning_dpo.tuning.search.starting_points import Start, ray_config_of

__all__ = ["has_pruner", "is_plain", "learns_from_results", "make_searcher", "ray_space", "trials_of"]

_PLAIN = ("random", "grid")


def make_searcher(
    choice: str | Mapping[str, Any],
    *,
    space: SearchSpace,
    objective: Objective,
    seed: int,
    name: str = "sweep",
    start: Start | None = None,
    done: Iterable[Mapping[str, Any]] = (),
    limit: int | None = None,
    goes_on: bool = False,
) -> Any:
    """The searcher.

    Args:
        choice: "random", "grid", "optuna", or ``{class_path: ..., init_args: ...}``.
        space: What varies.
        objective: One goal or several.
        seed: Seed of the search.
        name: The sweep's, which Optuna's study takes where it is given none.
        start: Points that it begins with.
        done: Values by config path of trials that have run: a grid and random draws pass over them.
        limit: Trials that a grid and random draws make at most.
        goes_on: Open Optuna's study though it has trials.

    Raises:
        ValueError: If the searcher does not take the space, several goals or starting points.
    """
    kind, arguments = class_and_arguments(choice)
    start = start or Start()
    if kind in _PLAIN:
        if kind == "grid" and any(p.domain is not None for p in space.parameters):
            drawn = [p.path for p in space.parameters if p.domain is not None]
            raise ValueError(
                f'`search="grid"` needs every path as {{grid: [...]}}, got {", ".join(drawn)} drawn'
            )
        # Those of a grid are points of it, see `ray_space`.
        points = [] if space.grid else [ray_config_of(point.overrides, space) for point in start.run]
        return PlainSearch(space, points=points, done=done, limit=limit, random_state=seed, **arguments)
    if kind == "optuna":
        return _optuna(space, objective, arguments, seed=seed, name=name, start=start, goes_on=goes_on)
    cls = _class_of(kind)
    if space.grid:
        raise ValueError(f"`search` {kind} takes no grid, got {space.grid[0].path}; use choice in its place")
    if len(objective.goals) > 1:
        raise ValueError(f'several goals need `search="optuna"`, got {kind}')
    return _of_class(cls, space, objective, arguments, start)


def _class_of(kind: str) -> Any:
    """The class of a searcher that is named by its path."""
    if "." not in kind:
        raise ValueError(
            "`search` must be one of random, grid, optuna or importable as package.module.Class, got "
            f"{kind!r}"
        )
    return import_object(kind)


def is_plain(choice: str | Mapping[str, Any]) -> bool:
    """Whether a search is a grid or random draws, which learn nothing.

    Args:
        choice: As `make_searcher` takes it.
    """
    return class_and_arguments(choice)[0] in _PLAIN


def learns_from_results(choice: str | Mapping[str, Any]) -> bool:
    """Whether a searcher can be told results of points that it did not choose.

    Args:
        choice: As `make_searcher` takes it.
    """
    kind, _ = class_and_arguments(choice)
    if kind in _PLAIN or kind == "optuna":
        return kind == "optuna"
    own = getattr(_class_of(kind), "add_evaluated_point", None)
    return own is not None and own is not Searcher.add_evaluated_point


def has_pruner(choice: str | Mapping[str, Any]) -> bool:
    """Whether a search names one of Optuna's pruners.

    Args:
        choice: As `make_searcher` takes it.
    """
    kind, arguments = class_and_arguments(choice)
    return kind == "optuna" and arguments.get("pruner") is not None


def ray_space(
    choice: str | Mapping[str, Any], space: SearchSpace, start: Start | None = None
) -> dict[str, Any]:
    """The space as Ray's `param_space`: empty where the searcher itself was given it.

    Args:
        choice: As `make_searcher` takes it.
        space: What varies.
        start: Points that the searcher begins with; in a grid they come first.
    """
    start = start or Start()
    if class_and_arguments(choice)[0] == "optuna" or (start.told and not is_plain(choice)):
        return {}
    config = space.ray_config()
    if start.run and space.grid and is_plain(choice):
        config[GRID_KEY] = tune.grid_search(_points_of_grid(space, start))
    return config


def trials_of(choice: str | Mapping[str, Any], space: SearchSpace, *, samples: int, start: Start) -> int:
    """How many trials a sweep has in all.

    Args:
        choice: As `make_searcher` takes it.
        space: What varies.
        samples: The sweep's.
        start: Points that it begins with.
    """
    if not is_plain(choice) or not space.grid:
        return samples
    return samples * len(_points_of_grid(space, start))


def _points_of_grid(space: SearchSpace, start: Start) -> list[dict[str, Any]]:
    """The grid with the points that a sweep starts from first: points of the grid, or more of them."""
    points: list[dict[str, Any]] = []
    for point in start.run:
        config = ray_config_of(point.overrides, space)
        points.append({**config.pop(GRID_KEY), **config})
    return [*points, *(point for point in space.grid_points() if point not in points)]


def _of_class(
    cls: Any, space: SearchSpace, objective: Objective, arguments: dict[str, Any], start: Start
) -> Any:
    """A searcher of Ray's interface. Of its space it hears from Tune, or at once where it is told results."""
    goal = objective.primary
    given = {"metric": goal.metric, "mode": goal.mode, **arguments}
    if start.run:
        if "points_to_evaluate" not in inspect.signature(cls).parameters:
            raise ValueError(f"`start_from` cannot be used: {cls.__name__} takes no points to run first")
        given["points_to_evaluate"] = [ray_config_of(p.overrides, space, filled=True) for p in start.run]
    if not start.told:
        return cls(**given)
    searcher = cls(space=space.ray_config(), **given)
    for point in start.told:
        assert point.result is not None
        searcher.add_evaluated_point(ray_config_of(point.overrides, space, filled=True), point.result[0])
    return searcher


def _optuna(
    space: SearchSpace,
    objective: Objective,
    arguments: dict[str, Any],
    *,
    seed: int,
    name: str,
    start: Start,
    goes_on: bool,
) -> Any:
    from lightning_dpo.tuning.search.optuna_study import make_study_search

    unknown = [p for p in space.parameters if not is_known_to_optuna(p)]
    if unknown:
        raise ValueError(
            f'`search="optuna"` has no {unknown[0].kind} for {unknown[0].path}; use another domain'
        )
    return make_study_search(
        arguments,
        space=space,
        objective=objective,
        seed=seed,
        study_name=name,
        start=start,
        is_new=not goes_on,
    )
