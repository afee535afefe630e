"""Where a search starts: points that are known to be good, with their results where these are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.search.sample import Float, Integer

from lightning_dpo.tuning.config_paths import nearest
from lightning_dpo.tuning.objective import Objective
from lightning_dpo.tuning.search.space import GRID_KEY, Parameter, SearchSpace

__all__ = ["EarlierSweep", "Start", "StartingPoint", "complete", "parse_start", "ray_config_of"]

_RESULT, _SWEEP, _RUN = "result", "sweep", "run"


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """A point of the search space.

    Attributes:
        overrides: A value for each path of the space whose condition holds, constants included.
        result: The value of each of the objective's metrics, in the order of its goals; None where it is not
            known.
        origin: Where it stands, for messages, such as ``start_from[0]``.
        trial: Of an earlier sweep's trial its name, else empty.
    """

    overrides: Mapping[str, Any]
    result: tuple[float, ...] | None = None
    origin: str = "start_from"
    trial: str = ""


@dataclass(frozen=True, slots=True)
class EarlierSweep:
    """A sweep whose trials a search starts from.

    Attributes:
        location: Its folder or URL.
        run: How many of its best trials are run again first; None tells the searcher all results instead.
        origin: Where it stands, for messages.
    """

    location: str
    run: int | None = None
    origin: str = "start_from"


@dataclass(frozen=True, slots=True)
class Start:
    """What a searcher begins with.

    Attributes:
        run: Points that are run first, in this order.
        told: Points whose results the searcher is told; they are not run.
    """

    run: tuple[StartingPoint, ...] = ()
    told: tuple[StartingPoint, ...] = ()


def parse_start(
    entries: Any, *, space: SearchSpace, objective: Objective
) -> tuple[StartingPoint | EarlierSweep, ...]:
    """Read what stands in YAML; no file is opened.

    Args:
        entries: One of these, or a list of them: values by config path, with their ``result`` beside them
            where it is known (a number, or one for each metric of the objective); ``{sweep: FOLDER}``, or
            the folder alone; ``{sweep: FOLDER, run: 3}``.
        space: What the sweep varies.
        objective: Its goals.

    Raises:
        ValueError: For a path that the space does not have, a value outside of it, or a missing one.
    """
    if entries is None:
        return ()
    listed = list(entries) if isinstance(entries, list | tuple) else [entries]
    found: list[StartingPoint | EarlierSweep] = []
    for number, entry in enumerate(listed):
        name = f"start_from[{number}]" if isinstance(entries, list | tuple) else "start_from"
        given = {_SWEEP: entry} if isinstance(entry, str) else entry
        if not isinstance(given, Mapping) or not given:
            raise ValueError(
                f"`{name}` must be values by config path, such as {{{space.paths[0]}: ...}}, or "
                f"{{sweep: FOLDER}}, got {entry!r}"
            )
        if _SWEEP in given:
            found.append(_earlier_sweep(given, name))
        else:
            values = {path: value for path, value in given.items() if path != _RESULT}
            result = _result(given[_RESULT], objective, name) if given.get(_RESULT) is not None else None
            found.append(StartingPoint(complete(values, space=space, name=name), result, name))
    return tuple(found)


def complete(values: Mapping[str, Any], *, space: SearchSpace, name: str) -> dict[str, Any]:
    """Values as a trial has them, constants included, once they are known to lie in the space.

    Args:
        values: By config path.
        space: What the sweep varies.
        name: What a message calls the point.

    Raises:
        ValueError: If a path is unknown or missing, or a value lies outside.
    """
    for path in values:
        if path not in space.paths:
            raise ValueError(
                f"`{name}` must set paths of `space`, got {path!r}; did you mean "
                f"{nearest(path, space.paths)!r}? Values that all trials share belong to `overrides`"
            )
    point: dict[str, Any] = {}
    for parameter in space.parameters:
        path = parameter.path
        if not parameter.is_active(point):
            continue
        if path in values:
            _check_within(parameter, values[path], name)
            point[path] = values[path]
        elif parameter.kind == "constant":
            point[path] = parameter.values[0]
        else:
            raise ValueError(f"`{name}` must set every path of `space`, got none for {path!r}")
    unused = next((path for path in values if path not in point), None)
    if unused is not None:
        conditions = [dict(p.when) for p in space.parameters if p.path == unused]
        raise ValueError(
            f"`{name}` must set paths whose `when` holds, got {unused!r}, which is varied only where "
            f"{' or '.join(map(str, conditions))}"
        )
    return point


def ray_config_of(
    overrides: Mapping[str, Any], space: SearchSpace, *, filled: bool = False
) -> dict[str, Any]:
    """A point as Ray's config; `space.overrides` gives the point again.

    Args:
        overrides: A value for each path whose condition holds.
        space: What the sweep varies.
        filled: Set parameters whose condition does not hold too, as searchers need that draw all of them.
    """
    drawn: dict[str, Any] = {}
    grid: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    for parameter in space.parameters:
        if not parameter.is_active(chosen):
            if filled and parameter.domain is not None:
                drawn[parameter.key] = parameter.examples()[0]
            continue
        chosen[parameter.path] = overrides[parameter.path]
        if parameter.kind != "constant":
            target = grid if parameter.kind == "grid" else drawn
            target[parameter.key] = overrides[parameter.path]
    return {**drawn, GRID_KEY: grid} if space.grid else drawn


def _earlier_sweep(given: Mapping[str, Any], name: str) -> EarlierSweep:
    run = given.get(_RUN)
    unknown = [key for key in given if key not in (_SWEEP, _RUN)]
    if unknown or not isinstance(given[_SWEEP], str):
        raise ValueError(
            f"`{name}` must be {{sweep: FOLDER}} or {{sweep: FOLDER, run: 3}}, got {dict(given)}"
        )
    if run is not None and (isinstance(run, bool) or not isinstance(run, int) or run < 1):
        raise ValueError(f"`{name}.run` must be how many of its best trials run first, got {run!r}")
    return EarlierSweep(given[_SWEEP], run, name)


def _result(value: Any, objective: Objective, name: str) -> tuple[float, ...]:
    metrics = [goal.metric for goal in objective.goals]
    given = value if isinstance(value, Mapping) else {metrics[0]: value}
    if len(metrics) > 1 and not isinstance(value, Mapping):
        raise ValueError(
            f"`{name}.result` must have a value for each goal, "
            f"{{{', '.join(f'{metric}: ...' for metric in metrics)}}}, got {value!r}"
        )
    unknown = [metric for metric in given if metric not in metrics]
    missing = [metric for metric in metrics if metric not in given]
    if unknown or missing:
        what = f"no {missing[0]!r}" if missing else repr(unknown[0])
        raise ValueError(f"`{name}.result` must have the metrics of `objective`, {metrics}, got {what}")
    if not all(_is_number(given[metric]) and math.isfinite(given[metric]) for metric in metrics):
        raise ValueError(f"`{name}.result` must be finite numbers, got {value!r}")
    return tuple(float(given[metric]) for metric in metrics)


def _check_within(parameter: Parameter, value: Any, name: str) -> None:
    """Refuse a value that the search could not draw."""
    told = f"`{name}` must lie within `space`, got {parameter.path} = {value!r}"
    if parameter.values:
        if not any(_is_same(value, allowed) for allowed in parameter.values):
            raise ValueError(f"{told}, which is none of {list(parameter.values)}")
        return
    domain = parameter.domain
    if not isinstance(domain, Float | Integer):
        return  # a function of the user's
    if not _is_number(value):
        raise ValueError(f"{told}, which is no number")
    if isinstance(domain, Integer) and value != int(value):
        raise ValueError(f"{told}, which is no whole number")
    step = getattr(domain.sampler, "q", None)
    if domain.upper is not None and math.isfinite(domain.upper):
        # Ray's upper end of whole numbers is left out, except where they are rounded to a step.
        upper = domain.upper - 1 if isinstance(domain, Integer) and not step else domain.upper
        if not domain.lower <= value <= upper:
            raise ValueError(f"{told}, which is not from {domain.lower} to {upper}")
    if step and not math.isclose(round(value / step) * step, value, rel_tol=1e-9, abs_tol=1e-12):
        raise ValueError(f"{told}, which is no multiple of {step}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_same(value: Any, other: Any) -> bool:
    if _is_number(value) and _is_number(other):
        return math.isclose(value, other, rel_tol=1e-12)
    return type(value) is type(other) and bool(value == other)
