"""Schedulers, which stop trials early or hand weights on between them: by short name or class path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search.sample import Domain

from lightning_dpo.tuning.config_paths import class_and_arguments, import_object
from lightning_dpo.tuning.objective import Objective
from lightning_dpo.tuning.search.space import SearchSpace

__all__ = ["check_workers", "copies_checkpoints", "make_scheduler", "scheduler_class"]

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


def scheduler_class(choice: str | Mapping[str, Any]) -> Any:
    """The class that a choice names.

    Args:
        choice: One of the short names, alone or as ``class_path``, or any Ray scheduler's path.

    Raises:
        ValueError: If it cannot be imported.
    """
    name, _ = class_and_arguments(choice)
    if name in _SCHEDULERS:
        return _SCHEDULERS[name][0]
    if "." not in name:
        known = ", ".join(_SCHEDULERS)
        raise ValueError(
            f"`scheduler` must be one of {known} or importable as package.module.Class, got {name!r}"
        )
    return import_object(name)


def copies_checkpoints(scheduler: Any) -> bool:
    """Whether schedulers of a class hand the weights of one trial to another one.

    Args:
        scheduler: The class, as `scheduler_class` gives it.
    """
    return isinstance(scheduler, type) and issubclass(scheduler, PopulationBasedTraining)


def check_workers(scheduler: Any, *, workers: int) -> None:
    """Refuse several workers where checkpoints are copied between trials: those of workers are not Tune's.

    Args:
        scheduler: The class, as `scheduler_class` gives it.
        workers: Processes of a trial.

    Raises:
        ValueError: If the two do not go together.
    """
    if workers > 1 and copies_checkpoints(scheduler):
        raise ValueError(
            f"`scheduler` {scheduler.__name__} copies checkpoints between trials of one process; "
            f"got workers={workers}. Use asha, hyperband or median"
        )


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
    name, arguments = class_and_arguments(choice)
    cls = scheduler_class(choice)
    defaults = _SCHEDULERS[name][1] if name in _SCHEDULERS else {}
    if cls is PopulationBasedTraining and "hyperparam_mutations" not in arguments:
        defaults = {**defaults, "hyperparam_mutations": _mutations(space)}
    if len(objective.goals) > 1 and cls is not FIFOScheduler:
        defaults = {**defaults, "metric": objective.primary.metric, "mode": objective.primary.mode}
    try:
        scheduler: TrialScheduler = cls(**{**defaults, **arguments})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"`scheduler` {name} does not take {arguments}: {error}") from error
    return scheduler


def _mutations(space: SearchSpace) -> dict[str, Any]:
    found = {p.key: p.domain for p in space.parameters if isinstance(p.domain, Domain) and not p.when}
    if not found:
        raise ValueError('`scheduler="pbt"` needs a path that is drawn from a range or a choice, got none')
    return found
