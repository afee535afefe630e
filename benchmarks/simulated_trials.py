"""Trials that take no time: a stand-in for the processes that Ray Tune starts, for sweeps of any size.

Tune's controller, searcher, scheduler and callbacks run as in any sweep; where they would start a process and
wait for it, `SimulatedActors` answers from a queue of events in simulated time. Trials write what real ones
write: records, outcomes of pairs, pointers to checkpoints. So what a sweep costs the process that drives it
can be measured with 512 trials at once on any machine, and counted in tests.
"""

from __future__ import annotations

import contextlib
import copy
import heapq
import itertools
import math
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.train._internal.session import _TrainingResult
from ray.tune import Checkpoint
from ray.tune.result import RESULT_DUPLICATE, SHOULD_CHECKPOINT, TRIAL_INFO

from lightning_dpo.tuning.cluster import tuner
from lightning_dpo.tuning.trial.checkpoints import SavedFolder, write_pointer
from lightning_dpo.tuning.trial.outcomes import PairOutcomes
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.trial.status import TrialStatus

__all__ = ["Simulation", "ThinModule", "simulated"]

ACCURACY, KL = "val/rewards/accuracy", "val/kl"


class ThinModule(pl.LightningModule):
    """Says what a sweep asks of a module's class; simulated trials make none."""

    def __init__(self, *, beta: float = 0.1, lr: float = 1e-4) -> None:
        super().__init__()

    @classmethod
    def logged_metrics(cls) -> tuple[str, ...]:
        return (ACCURACY, KL)

    def train_dataloader(self) -> Any:
        """It brings its data, so that a recipe names none."""
        raise AssertionError("simulated trials do not train")


class Simulation:
    """What trials report, and what they write.

    Attributes:
        reports: Validations of a whole trial.
        state_every: Reports from one full state, for which Tune gets a pointer, to the next.
        pairs: Validation pairs whose outcomes each trial keeps.
        seconds: That trials themselves took for writing, which is none of the driver's.
        events: How many events Tune was told of.
    """

    def __init__(self, *, reports: int = 8, state_every: int = 4, pairs: int = 200) -> None:
        self.reports = reports
        self.state_every = state_every
        self.pairs = pairs
        self.seconds = 0.0
        self.events = 0
        self.spec: TrialSpec | None = None
        self._keys = np.arange(pairs, dtype=np.uint64)

    def trial(self, trial_id: str, config: Mapping[str, Any]) -> _Trial:
        """A trial of these values."""
        assert self.spec is not None
        return _Trial(self, self.spec, trial_id, config)

    def outcomes(self, accuracy: float, draw: random.Random, *, step: int) -> PairOutcomes:
        """What a validation finds for each pair."""
        values = np.random.default_rng(draw.randrange(2**32)).random(self.pairs) < accuracy
        return PairOutcomes(self._keys, values.astype(np.float64), np.ones(self.pairs), step)


class _Trial:
    """One trial: the record that it writes, and its next report."""

    def __init__(
        self, simulation: Simulation, spec: TrialSpec, trial: str, config: Mapping[str, Any]
    ) -> None:
        self._simulation = simulation
        self._spec = spec
        self._draw = random.Random(trial.rpartition("_")[2])
        self.record: TrialRecord = spec.new_record(trial, config).restarted()
        self.folder: Path | None = None
        beta, rate = (float(self.record.overrides[f"model.{name}"]) for name in ("beta", "lr"))
        self._quality = 0.75 - 0.05 * (math.log10(rate) + 5) ** 2 - 0.05 * (math.log10(beta) + 1) ** 2
        self.record.save(spec.records)

    def pace(self) -> float:
        """Simulated seconds to the next report."""
        return self._draw.uniform(50, 70)

    def next_report(self) -> dict[str, Any] | None:
        """Write and give the next report; None where the trial is over."""
        if len(self.record.history) == self._simulation.reports:
            self.record.ended(TrialStatus.FINISHED).save(self._spec.records)
            return None
        number = len(self.record.history) + 1
        share = 1 - math.exp(-3 * number / self._simulation.reports)
        accuracy = 0.5 + (self._quality - 0.5) * share
        step, total = 40 * number, 40 * self._simulation.reports
        found = self._simulation.outcomes(accuracy, self._draw, step=step)
        metrics = {
            ACCURACY: found.mean,
            KL: 30 * share * self._draw.uniform(0.5, 1.5),
            **{"step": step, "epoch": 0, "total_steps": total, "seconds": 5.0 * step},
            **{"startup_seconds": 0.2, "reference_passes": 0},
        }
        found.save(self._spec.outcomes, f"{self.record.id}/rank0")
        is_state = number % self._simulation.state_every == 0 and number < self._simulation.reports
        saved = SavedFolder(1, step, is_state)
        self.record = self.record.reported(
            metrics, checkpoint=self._spec.checkpoints.location(self.record.id, saved)
        )
        self.record.save(self._spec.records)
        if not is_state:
            return metrics
        self.folder = Path(tempfile.mkdtemp())
        write_pointer(self.folder, self.record.id, saved)
        return {**metrics, SHOULD_CHECKPOINT: True}


_HANDLE = SimpleNamespace(get_auto_filled_metrics=SimpleNamespace(remote=lambda **_: {}))
"""All that Tune itself asks of a process."""


class SimulatedActors:
    """Takes the place of Tune's `RayActorManager`."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, TrackedActor, Callable[[], None]]] = []
        self._trials: dict[TrackedActor, _Trial] = {}
        self._reports: Counter[TrackedActor] = Counter()
        self._live_actors_to_ray_actors_resources: dict[TrackedActor, tuple[Any, Any]] = {}
        self._storages: dict[TrackedActor, Any] = {}

    num_pending_actors = 0
    num_actor_tasks = 0

    @property
    def num_live_actors(self) -> int:
        return len(self._live_actors_to_ray_actors_resources)

    num_total_actors = num_live_actors

    def get_live_actors_resources(self) -> dict[str, float]:
        return {"GPU": float(self.num_live_actors)}

    def add_actor(
        self,
        cls: Any,
        resource_request: Any,
        kwargs: dict[str, Any],
        on_start: Any,
        on_stop: Any,
        on_error: Any,
    ) -> TrackedActor:
        actor = TrackedActor(next(self._order), on_start=on_start, on_stop=on_stop, on_error=on_error)

        def start() -> None:
            self._live_actors_to_ray_actors_resources[actor] = (_HANDLE, resource_request)
            self._begin(actor, kwargs["config"], kwargs["storage"])
            on_start(actor)

        self._schedule(actor, 0.0, start)
        return actor

    def is_actor_started(self, tracked_actor: TrackedActor) -> bool:
        return tracked_actor in self._live_actors_to_ray_actors_resources

    def is_actor_failed(self, tracked_actor: TrackedActor) -> bool:
        return False

    def schedule_actor_task(
        self,
        tracked_actor: TrackedActor,
        method_name: str,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        on_result: Any = None,
        on_error: Any = None,
        _return_future: Any = False,
    ) -> Any:
        delay = self._trials[tracked_actor].pace() if method_name == "train" else 0.0

        def work() -> None:
            result = self._result(tracked_actor, method_name, args, kwargs or {})
            if on_result is not None:
                on_result(tracked_actor, result)

        self._schedule(tracked_actor, delay, work)
        return object() if _return_future else None

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:
        self._events = [event for event in self._events if event[2] != tracked_actor]
        heapq.heapify(self._events)

    def remove_actor(self, tracked_actor: TrackedActor, kill: Any = False, stop_future: Any = None) -> bool:
        def stop() -> None:
            self._live_actors_to_ray_actors_resources.pop(tracked_actor, None)
            if tracked_actor._on_stop is not None:
                tracked_actor._on_stop(tracked_actor)

        self._schedule(tracked_actor, 0.0, stop)
        return self.is_actor_started(tracked_actor)

    def next(self, timeout: float | None = None) -> bool:
        if not self._events:
            return False
        self._now, _, _, work = heapq.heappop(self._events)
        self._simulation.events += 1
        work()
        return True

    def cleanup(self) -> None:
        self._events.clear()

    def _schedule(self, actor: TrackedActor, delay: float, work: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + delay, next(self._order), actor, work))

    def _begin(self, actor: TrackedActor, config: dict[str, Any], storage: Any) -> None:
        values = dict(config)
        info = values.pop(TRIAL_INFO)
        began = time.perf_counter()
        self._trials[actor] = self._simulation.trial(info._trial_id, values)
        self._simulation.seconds += time.perf_counter() - began
        self._reports[actor] = 0
        self._storages[actor] = copy.copy(storage)

    def _result(self, actor: TrackedActor, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if method == "reset":
            self._begin(actor, args[0], kwargs["storage"])
            return True
        trial = self._trials[actor]
        if method == "save":
            assert trial.folder is not None
            storage = self._storages[actor]
            storage.current_checkpoint_index += 1
            stored = storage.persist_current_checkpoint(Checkpoint.from_directory(trial.folder))
            shutil.rmtree(trial.folder)
            return _TrainingResult(stored, dict(trial.record.last))
        if method != "train":
            return None
        began = time.perf_counter()
        metrics = trial.next_report()
        self._simulation.seconds += time.perf_counter() - began
        if metrics is None:
            return {"done": True, RESULT_DUPLICATE: True}
        self._reports[actor] += 1
        now = int(time.time())
        return {
            **metrics,
            "timestamp": now,
            "date": time.strftime("%Y-%m-%d_%H-%M-%S"),
            "training_iteration": self._reports[actor],
            "iterations_since_restore": self._reports[actor],
            "time_this_iter_s": 60.0,
            "time_total_s": metrics["seconds"],
            "time_since_restore": metrics["seconds"],
            "trial_id": trial.record.id,
            "done": False,
            "pid": os.getpid(),
            "hostname": "simulated",
            "node_ip": "127.0.0.1",
            "config": dict(trial.record.overrides),
        }


@contextlib.contextmanager
def simulated(simulation: Simulation) -> Iterator[None]:
    """Sweeps within the block simulate their trials."""
    real = tuner._trainable

    def trainable(spec: TrialSpec) -> Any:
        simulation.spec = spec
        return real(spec)

    with (
        patch.object(tuner, "_trainable", trainable),
        patch(
            "ray.tune.execution.tune_controller.RayActorManager",
            lambda resource_manager: SimulatedActors(simulation),
        ),
    ):
        yield
