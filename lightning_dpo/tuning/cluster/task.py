"""Functions that run once, on machines like those of trials."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray

from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["run_as_task", "run_as_tasks"]


def run_as_task(spec: TrialSpec, function: Any, *arguments: Any) -> Any:
    """Run a function with the resources of one worker of a trial.

    Args:
        spec: What the sweep's trials have in common; the function's first argument.
        function: What to run.
        arguments: Its other arguments.

    Returns:
        What the function returns.

    Raises:
        ValueError: If the function raises one.
    """
    try:
        return ray.get(_remote(spec, function).remote(spec, *arguments))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(f"the recipe does not run: {error.cause}") from error
        raise


def run_as_tasks(spec: TrialSpec, function: Any, calls: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """Run a function several times, as many at once as the cluster holds.

    Args:
        spec: What the sweep's trials have in common; the function's first argument.
        function: What to run.
        calls: Keyword arguments of each call.

    Yields:
        What each call returns, in their order, as soon as it and those before it are done.

    Raises:
        ValueError: If a call raises one.
    """
    remote, held = _remote(spec, function), ray.put(spec)
    waiting = [remote.remote(held, **call) for call in calls]
    try:
        for result in waiting:
            yield ray.get(result)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from error
        raise
    finally:
        for result in waiting:
            ray.cancel(result, recursive=False)


def _remote(spec: TrialSpec, function: Any) -> Any:
    resources = spec.resources
    return ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=1)(function)
