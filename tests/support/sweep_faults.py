"""Callbacks that bring a trial down, by its beta; named in recipes by class path."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining

KILLED, EXHAUSTED, DIVERGED, BROKEN = 0.1, 0.2, 0.3, 0.4
KILLED_NEXT = KILLED + 1e-9


class Trouble(pl.Callback):
    """At a step: kills the process once, runs out of memory, poisons the weights, or raises, by the beta.

    The marker of a kill names the trials that ran then, if it is told where their records are.
    """

    def __init__(self, marker: str, step: int = 3, records: str | None = None) -> None:
        self.marker = Path(marker)
        self.step = step
        self.records = records

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step != self.step:
            return
        beta = pl_module.loss.beta
        if beta == KILLED and not self.marker.exists():
            known = [] if self.records is None else Path(self.records).glob("*.json")
            running = [path.stem for path in known if json.loads(path.read_text())["status"] == "running"]
            self.marker.write_text(" ".join(running))
            os.kill(os.getpid(), signal.SIGKILL)
        if beta == EXHAUSTED:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if beta == BROKEN:
            raise KeyError("a mistake of one's own")
        if beta == DIVERGED:
            with torch.no_grad():
                next(pl_module.policy.parameters()).fill_(float("nan"))


class Slow(pl.Callback):
    """Waits at each step, so that there is time to kill the driver."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(self.seconds)


class WorkerTrouble(pl.Callback):
    """At the third step, in one of several workers: kills it once or each time, or raises, by the beta."""

    def __init__(self, marker: str) -> None:
        self.marker = Path(marker)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step != 3:
            return
        beta, rank = pl_module.loss.beta, trainer.global_rank
        once = self.marker.with_name(f"killed{rank}")
        if (beta, rank) in ((KILLED, 0), (KILLED_NEXT, 1)) and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if (beta, rank) == (EXHAUSTED, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if (beta, rank) == (BROKEN, 1):
            raise KeyError("a mistake of one's own")


class PausesAlways(FIFOScheduler):
    """Pauses a trial at each of its reports, the last one too."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return str(FIFOScheduler.PAUSE)


class Meddler(FIFOScheduler):
    """Stops the first trial at its second report, and kills the process of the second one once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.has_killed = False

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if trial.trial_id not in self.seen:
            self.seen.append(trial.trial_id)
        number = self.seen.index(trial.trial_id)
        if number == 0 and result["step"] == 4:
            return self.STOP
        if number == 1 and not self.has_killed:
            self.has_killed = True
            os.kill(result["pid"], signal.SIGKILL)
        return self.CONTINUE


class OwnPopulation(PopulationBasedTraining):
    """A user's kind of population-based training."""
