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

from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.fit import TrialPlan
from lightning_dpo.tuning.workers.cleanup import Keeper
from lightning_dpo.tuning.workers.loop import serve
from lightning_dpo.tuning.workers.mailbox import Desk, Event, TellLosses

__all__ = ["Group", "make_trainer", "placement"]

FOLDER = "workers"


class Group:
    """Workers under Ray's TorchTrainer, which lives as long as this process does.

    A worker that fails makes Ray start all of them again, without limit: how often one trial may lose them
    is for its driver to count.
    """

    def __init__(self, plan: TrialPlan) -> None:
        """Start the workers; they are there when the first job is begun or later."""
        self._plan = plan
        self._error: BaseException | None = None
        self._desk: Any = ray.remote(num_cpus=0)(Desk).remote(plan.workers)
        # Not within what Tune reserved for this process, with which it would go.
        keeper: Any = ray.remote(num_cpus=0)(Keeper)
        keeper = keeper.options(scheduling_strategy="DEFAULT", lifetime="detached").remote(self._desk)
        keeper.wait.remote()
        self._trainer = make_trainer(
            plan,
            serve,
            {"plan": plan},
            name=f"group_{uuid.uuid4().hex[:8]}",
            retries=-1,
            extra={"desk": self._desk},
            callbacks=[TellLosses(self._desk)],
        )
        self._thread = threading.Thread(target=self._fit, daemon=True, name="group of workers")
        self._thread.start()

    def serves(self, plan: TrialPlan) -> bool:
        """Whether the workers are alive and have this plan."""
        mine = self._plan
        return self._thread.is_alive() and (mine.location, mine.workers) == (plan.location, plan.workers)

    def begin(self, trial: str, overrides: Mapping[str, Any]) -> None:
        """Give the workers a trial."""
        ray.get(self._desk.begin.remote(trial, dict(overrides)))

    def end(self) -> None:
        """Take it back."""
        ray.get(self._desk.end.remote())

    def event(self) -> Event:
        """Wait for what happens next.

        Raises:
            RuntimeError: If there are no workers any more.
        """
        next_one = self._desk.event.remote()
        while True:
            found, _ = ray.wait([next_one], timeout=1.0)
            if found:
                event: Event = ray.get(next_one)
                return event
            if not self._thread.is_alive():
                raise RuntimeError(f"the group of workers has ended: {self._error}") from self._error

    def go_on(self, step: int) -> None:
        """Let the workers go on after their report of this step."""
        ray.get(self._desk.go_on.remote(step))

    def stop(self) -> None:
        """Make the workers leave the trial at the report that they wait with.

        Tune does not wait for ever: where they do not leave, it ends this process, and Ray them with it.
        """
        ray.get(self._desk.refuse.remote())
        while self.event().kind == "report":
            pass

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # shown to the thread that waits
            self._error = error


def make_trainer(
    plan: TrialPlan,
    function: Callable[[dict[str, Any]], None],
    arguments: Mapping[str, Any],
    *,
    name: str,
    retries: int,
    extra: Mapping[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    is_spread: bool = False,
) -> TorchTrainer:
    """A trainer whose workers run a function of these arguments.

    Args:
        plan: The sweep; says how many workers, and what each one gets.
        function: What they run.
        arguments: Large values; they travel through the object store, once for each machine.
        name: Of the folder for its checkpoints.
        retries: How often a group that lost a worker starts again.
        extra: Small arguments.
        callbacks: Ray's.
        is_spread: Whether to use as many machines as there are, not as few as will do.
    """
    # Reports wait for the next look at the workers: two seconds by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    storage = Storage(plan.location) / FOLDER
    resources = {"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})}
    return TorchTrainer(
        _unpacked,
        train_loop_config={
            "function": function,
            "arguments": [ray.put(dict(arguments))],
            "extra": dict(extra or {}),
        },
        scaling_config=train.ScalingConfig(
            num_workers=plan.workers,
            use_gpu=plan.gpus > 0,
            resources_per_worker=resources,
            placement_strategy=placement(plan) if is_spread else "PACK",
        ),
        run_config=train.RunConfig(
            name=name,
            storage_path=storage.path,
            failure_config=train.FailureConfig(max_failures=retries),
            callbacks=list(callbacks),
            **storage.ray_options(),
        ),
    )


def placement(plan: TrialPlan) -> str:
    """How Ray places workers that are to use the whole cluster: on CPUs, each on a machine of its own."""
    return "PACK" if plan.gpus else "SPREAD"


def _unpacked(config: dict[str, Any]) -> None:
    config["function"]({**ray.get(config["arguments"][0]), **config["extra"]})
