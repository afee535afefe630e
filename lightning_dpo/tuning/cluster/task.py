"""Functions that run once, on machines like those of trials."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_dpo.training.callbacks.quiet import quiet
from lightning_dpo.tuning.cluster.connect import is_this_machine_alone
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["beside", "run_as_task", "run_as_tasks", "run_preparation", "run_side_by_side", "value_errors"]

_SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


def run_preparation(spec: TrialSpec, function: Any, *arguments: Any) -> Any:
    """Run a function of what trials share: here where trials run here too, on CPUs, and else as a task.

    A process that Ray starts for it would first import torch and Lightning, which takes longer than the
    function itself on a small model. Random states are left as they were. Takes, returns and raises what
    `run_as_task` does.
    """
    if spec.resources.gpus or not is_this_machine_alone():
        return run_as_task(spec, function, *arguments)
    before = {name: os.environ.get(name) for name in _SEED_VARIABLES}
    try:
        with isolate_rng(), quiet():
            return function(spec, *arguments)
    except ValueError as error:
        raise ValueError(f"the recipe does not run: {error}") from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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
    with beside(spec, function, *arguments) as result:
        return result()


@contextlib.contextmanager
def beside(spec: TrialSpec, function: Any, *arguments: Any) -> Iterator[Callable[[], Any]]:
    """Let a function run, with the resources of one worker of a trial, while the block goes on.

    Takes what `run_as_task` does. The function is cancelled where the block ends before it.

    Yields:
        What waits for its end, and returns and raises what `run_as_task` does.
    """
    running = _remote(spec, function).remote(spec, *arguments)

    def result() -> Any:
        with value_errors("the recipe does not run: "):
            return ray.get(running)

    try:
        yield result
    finally:
        ray.cancel(running, recursive=False)


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
        with value_errors():
            for result in waiting:
                yield ray.get(result)
    finally:
        for result in waiting:
            ray.cancel(result, recursive=False)


@contextlib.contextmanager
def value_errors(prefix: str = "") -> Iterator[None]:
    """Raise a ValueError of a task as one of this process, for it is the user's to mend.

    Args:
        prefix: Put before what it says.
    """
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(f"{prefix}{error.cause}") from error
        raise


def run_side_by_side(function: Callable[..., None], calls: Sequence[Sequence[Any]]) -> None:
    """Run a function several times, each on one CPU: at once where Ray has this machine alone, or in turn.

    Args:
        function: What to run; it leaves what it finds in files.
        calls: The arguments of each call.
    """
    if len(calls) > 1 and ray.is_initialized() and is_this_machine_alone():
        remote = ray.remote(num_cpus=1)(function)
        ray.get([remote.remote(*arguments) for arguments in calls])
    else:
        for arguments in calls:
            function(*arguments)


def _remote(spec: TrialSpec, function: Any) -> Any:
    resources = spec.resources
    return ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=1)(function)
