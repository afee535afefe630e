"""Training the methods of a frontier, each a sweep over its strengths and the seeds, two sweeps at a time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lightning_dpo.tuning.cluster.connect import node_resources, trials_at_once
from lightning_dpo.tuning.cluster.task import value_errors
from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.frontier.methods import TrainedMethod, folder_name
from lightning_dpo.tuning.frontier.result import Failure
from lightning_dpo.tuning.frontier.sampling import Run
from lightning_dpo.tuning.results.folder import load_result
from lightning_dpo.tuning.run import sweep
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["Trained", "sweeps_at_once", "train_methods"]

_SWEEPS_AT_ONCE = 2


class Trained(NamedTuple):
    """What became of a method.

    Attributes:
        method: Its name.
        runs: The policies.
        failures: What went wrong.
        seconds: How long it took.
    """

    method: str
    runs: list[Run]
    failures: list[Failure]
    seconds: float


def sweeps_at_once(sweeps: Sequence[SweepConfig]) -> int:
    """How many sweeps share the cluster: two where it holds two trials or more, each of one process, or one.

    One of the two goes on while the other starts its processes, waits for its last trial or gathers what it
    found. Sweeps whose trials are of several processes, or share one, would wait for each other's.

    Args:
        sweeps: Which take the same of the cluster.
    """
    return min(_SWEEPS_AT_ONCE, len(sweeps), *(_trials_at_once(config) for config in sweeps[:1]))


def train_methods(
    spec: TrialSpec, methods: Sequence[TrainedMethod], sweeps: Sequence[SweepConfig], *, at_once: int
) -> Iterator[Trained]:
    """Train methods, or go on where an earlier run stopped, or read what it left.

    Args:
        spec: Gives the environment.
        methods: The methods.
        sweeps: Their sweeps.
        at_once: See `sweeps_at_once`; several are driven by processes of their own on this machine.

    Yields:
        What became of each, in the order in which they are done.

    Raises:
        ValueError: If a sweep cannot begin.
    """
    if at_once < 2:
        for method, config in zip(methods, sweeps, strict=True):
            yield _train(spec, method, config)
        return
    waiting = list(zip(methods, sweeps, strict=True))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(num_cpus=0, max_retries=0)(_train).options(scheduling_strategy=here)
    running: list[Any] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                method, config = waiting.pop(0)
                trials = _trials_at_once(config)
                # The last one to begin takes what the others leave.
                share = math.ceil(trials / at_once) if waiting else trials
                running.append(remote.remote(spec, method, dataclasses.replace(config, concurrency=share)))
            (done,), running = ray.wait(running, num_returns=1)
            with value_errors():
                trained = ray.get(done)
            yield trained
    finally:
        for each in running:
            ray.cancel(each)


def _trials_at_once(config: SweepConfig) -> int:
    resources = config.resources()
    if resources.workers > 1 or resources.packed > 1:
        return 1
    return config.concurrency or trials_at_once(node_resources(), resources)


def _train(spec: TrialSpec, method: TrainedMethod, config: SweepConfig) -> Trained:
    since = time.time()
    with spec.user_environment():
        runs, failures = _train_or_read(method, config)
    return Trained(method.name, runs, failures, time.time() - since)


def _train_or_read(method: TrainedMethod, config: SweepConfig) -> tuple[list[Run], list[Failure]]:
    """The policies of a method's sweep, and what went wrong."""
    location = (Storage(config.storage) / str(config.name)).location
    try:
        if Storage(location).read("sweep.json") is None:
            sweep(config, resume=True, verbose=False)
    except ValueError as error:
        if Storage(location).read("sweep.json") is None:  # what is known of its trials is told one by one
            return [], [Failure(method.name, "all runs", str(error))]
    runs, failures = [], []
    for trial in load_result(location).trials:
        strength, seed = float(trial.overrides[method.path]), int(trial.overrides["seed_everything"])
        if trial.is_ranked and trial.checkpoint is not None:
            file = f"{folder_name(method.name)}/{trial.id}.parquet"
            runs.append(Run(method.name, strength, seed, file, trial.checkpoint))
        else:
            failures.append(Failure(method.name, f"{strength:g}, seed {seed}", _reason(trial)))
    return runs, failures


def _reason(trial: TrialRecord) -> str:
    return f"{trial.status}: {trial.reason or 'no reason was recorded'}"
