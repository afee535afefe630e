"""A function that runs once, on a machine like those of trials."""

from __future__ import annotations

from typing import Any

import ray

from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["run_as_task"]


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
    resources = spec.resources
    task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=1)(function)
    try:
        return ray.get(task.remote(spec, *arguments))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(f"the recipe does not run: {error.cause}") from error
        raise
