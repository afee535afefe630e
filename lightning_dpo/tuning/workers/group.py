"""A group of workers that trains one trial after another, and stays warm between them."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray import train
from ray.train.torch import TorchTrainer

from lightning_dpo.tuning.cluster.resources import Resources
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.workers.loop import worker_loop
from lightning_dpo.tuning.workers.mailbox import Event, Mailbox, ReportWorkerFailures
from lightning_dpo.tuning.workers.placement_release import PlacementReleaser

__all__ = ["Group", "cluster_placement", "make_trainer"]

_FOLDER = "workers"


class Group:
    """Workers under Ray's TorchTrainer, which lives as long as this process does.

    A worker that fails makes Ray start all of them again, without limit: how often that may happen to one
    trial is for its driver to count.
    """

    def __init__(self, spec: TrialSpec) -> None:
        """Start the workers; they are there when the first job is begun or later.

        Args:
            spec: What the trials that they will train have in common.
        """
        self._spec = spec
        self._error: BaseException | None = None
        self._mailbox: Any = ray.remote(num_cpus=0)(Mailbox).remote(spec.resources.workers)
        # Not within what Tune reserved for this process, with which it would go.
        releaser: Any = ray.remote(num_cpus=0)(PlacementReleaser)
        releaser = releaser.options(scheduling_strategy="DEFAULT", lifetime="detached").remote()
        releaser.watch.remote(self._mailbox)
        self._trainer = make_trainer(
            spec,
            worker_loop,
            {"spec": spec},
            name=f"group_{uuid.uuid4().hex[:8]}",
            retries=-1,
            extra={"mailbox": self._mailbox},
            callbacks=[ReportWorkerFailures(self._mailbox)],
        )
        self._thread = threading.Thread(target=self._fit, daemon=True, name="group of workers")
        self._thread.start()

    def trains(self, spec: TrialSpec) -> bool:
        """Whether the workers are alive and train the trials of this sweep."""
        mine = self._spec
        return self._thread.is_alive() and (mine.location, mine.resources) == (spec.location, spec.resources)

    def begin_job(self, trial: str, overrides: Mapping[str, Any]) -> None:
        """Give the workers a trial."""
        ray.get(self._mailbox.begin_job.remote(trial, dict(overrides)))

    def end_job(self) -> None:
        """Take the trial back from the workers."""
        ray.get(self._mailbox.end_job.remote())

    def next_event(self) -> Event:
        """Wait for what happens next.

        Raises:
            RuntimeError: If there are no workers any more.
        """
        next_one = self._mailbox.next_event.remote()
        while True:
            found, _ = ray.wait([next_one], timeout=1.0)
            if found:
                event: Event = ray.get(next_one)
                return event
            if not self._thread.is_alive():
                raise RuntimeError(f"the group of workers has ended: {self._error}") from self._error

    def answer_report(self, step: int) -> None:
        """Let the workers go on after their report of this step."""
        ray.get(self._mailbox.answer_report.remote(step))

    def stop_job(self) -> None:
        """Make the workers leave the trial at the report that they wait with.

        Tune does not wait for ever: where they do not leave, it ends this process, and Ray them with it.
        """
        ray.get(self._mailbox.stop_job.remote())
        while self.next_event().kind == "report":
            pass

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # shown to the thread that waits
            self._error = error


def make_trainer(
    spec: TrialSpec,
    function: Callable[[dict[str, Any]], None],
    arguments: Mapping[str, Any],
    *,
    name: str,
    retries: int,
    extra: Mapping[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    placement: str = "PACK",
) -> TorchTrainer:
    """A trainer whose workers run a function of these arguments.

    Args:
        spec: What the trials have in common; says how many workers, and what each one gets.
        function: What they run.
        arguments: Large values; they travel through the object store, once for each machine.
        name: Name of the folder for its checkpoints.
        retries: How often a group of which a worker died starts again.
        extra: Small arguments.
        callbacks: Callbacks of Ray Train.
        placement: Ray's name of how workers are placed: on as few machines as will do, unless told otherwise.
    """
    # Reports wait for the next look at the workers: two seconds by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    storage = Storage(spec.location) / _FOLDER
    resources = spec.resources
    return TorchTrainer(
        _unpacked,
        train_loop_config={
            "function": function,
            "arguments": [ray.put(dict(arguments))],
            "extra": dict(extra or {}),
        },
        scaling_config=train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker=resources.per_worker,
            placement_strategy=placement,
        ),
        run_config=train.RunConfig(
            name=name,
            storage_path=storage.path,
            failure_config=train.FailureConfig(max_failures=retries),
            callbacks=list(callbacks),
            **storage.ray_options(),
        ),
    )


def cluster_placement(resources: Resources) -> str:
    """Ray's name of how workers are placed that are to use the whole cluster: without GPUs, one a machine."""
    return "PACK" if resources.gpus else "SPREAD"


def _unpacked(config: dict[str, Any]) -> None:
    config["function"]({**ray.get(config["arguments"][0]), **config["extra"]})
