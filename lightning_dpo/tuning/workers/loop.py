"""What each worker of a group runs: one trial after another."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import ray
from ray import train
from ray.util.placement_group import get_current_placement_group

from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.fit import Outcome, TrialPlan, fit_once, fit_trial
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.report_callback import reference_passes
from lightning_dpo.tuning.workers.mailbox import Job
from lightning_dpo.tuning.workers.strategies import make_strategy

__all__ = ["serve", "train_once"]

_LOST_PEER = ("gloo", "closed by peer", "reset by peer", "DistBackendError", "DistNetworkError", "NCCL")
"""In the errors of a worker whose neighbour has died."""


class _StoppedError(BaseException):
    """A scheduler has stopped the trial; no `except Exception` on the way takes it for a failure."""


def serve(arguments: dict[str, Any]) -> None:
    """Train the trials that the desk has, until this process is ended.

    Args:
        arguments: The sweep's `plan` and the `desk`.
    """
    plan, desk = arguments["plan"], arguments["desk"]
    rank = train.get_context().get_world_rank()
    ray.get(desk.placed.remote(get_current_placement_group()))
    number = 0
    while True:
        job: Job = ray.get(desk.job.remote(number))
        number = job.number
        with contextlib.suppress(_StoppedError):
            _train(plan, desk, job, is_first=rank == 0)
        ray.get(desk.leave.remote(number, rank))


def train_once(arguments: dict[str, Any]) -> None:
    """Run the recipe with these trainer `options`.

    Args:
        arguments: They, and the sweep's `plan`.
    """
    plan = arguments["plan"]
    fit_once(plan, {**_options(plan), **arguments["options"]}, callbacks=[_Share(plan)])


class _Share(pl.Callback):
    """Writes down which machine this worker is on, and how many batches its reference computed."""

    def __init__(self, plan: TrialPlan) -> None:
        self._records = Storage(plan.location) / "preparation"

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it."""
        share = {
            "node": ray.get_runtime_context().get_node_id(),
            "batches": reference_passes(pl_module),
        }
        self._records.write(f"worker{trainer.global_rank}.json", json.dumps(share))


def _train(plan: TrialPlan, desk: Any, job: Job, *, is_first: bool) -> None:
    state = TrialRecord.load(plan.records, job.trial) or TrialRecord(job.trial, job.overrides)
    if state.status not in ("running", "stopped"):
        return  # started again after a failure that would come again
    state = replace(state, overrides=job.overrides)

    def begin(saved: dict[str, Any] | None) -> None:
        nonlocal state
        state = state.restarted(saved)
        if is_first:
            state.save(plan.records)

    def send(metrics: dict[str, Any], folder: Path | None) -> None:
        nonlocal state
        totals = {name: metrics[name] for name in ("total_steps", "startup_seconds", "reference_passes")}
        before = state.checkpoint
        found = folder is not None and folder.is_dir()
        train.report(
            metrics,
            checkpoint=train.Checkpoint.from_directory(str(folder)) if found else None,
            checkpoint_dir_name=f"{job.trial}_{state.starts}_{metrics['step']:06d}",
        )
        state = state.reported(metrics, **totals)
        if is_first:
            kept = train.get_checkpoint()
            assert kept is not None
            state = replace(state, checkpoint=kept.path)
            state.save(plan.records)
            if before not in (None, kept.path):
                Storage(plan.location).remove(before)
        told = {**metrics, "checkpoint_path": state.checkpoint} if is_first else None
        if not ray.get(desk.reported.remote(job.number, metrics["step"], told)):
            raise _StoppedError

    with _checkpoint(plan, state) as (folder, saved):
        begin(saved)
        outcome = fit_trial(plan, state.overrides, send, checkpoint=folder, trainer_options=_options(plan))
    if outcome.status == "failed" and any(word in outcome.reason for word in _LOST_PEER):
        raise RuntimeError(f"lost another worker: {outcome.reason}")
    if is_first or outcome.status != "finished":
        # The first worker keeps the record; another one that failed adds only that.
        known = None if is_first else TrialRecord.load(plan.records, job.trial)
        _record_end(plan, known or state, outcome)
    if outcome.status != "finished":
        # Where one worker leaves, the others may wait for it for ever: Ray ends them all.
        raise RuntimeError(f"{outcome.status}: {outcome.reason}")


def _record_end(plan: TrialPlan, state: TrialRecord, outcome: Outcome) -> None:
    status: Any = outcome.status
    ended = replace(state, status=status, reason=outcome.reason, extra={"traceback": outcome.details})
    ended.save(plan.records)


@contextlib.contextmanager
def _checkpoint(
    plan: TrialPlan, state: TrialRecord
) -> Iterator[tuple[Path, dict[str, Any]] | tuple[None, None]]:
    """The folder of a trial's last checkpoint and what was reported with it; None where it has none."""
    if state.checkpoint is None:
        yield None, None
        return
    from lightning_dpo.tuning.trial.trainable import saved_report

    filesystem = Storage(plan.location).ray_options().get("storage_filesystem")
    with train.Checkpoint(state.checkpoint, filesystem=filesystem).as_directory() as name:
        folder = Path(name)
        yield folder, saved_report(folder)


def _options(plan: TrialPlan) -> dict[str, Any]:
    from ray.train.lightning import RayLightningEnvironment

    return {
        "devices": "auto" if plan.gpus else 1,
        "num_nodes": 1,
        "accelerator": "gpu" if plan.gpus else "cpu",
        "strategy": make_strategy(plan.strategy),
        "plugins": [RayLightningEnvironment()],  # type: ignore[no-untyped-call]
    }
