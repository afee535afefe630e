"""Trials of several workers: a group of processes that trains one model, driven from within the trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import train, tune
from ray.train.torch import TorchTrainer

from lightning_dpo.tuning.fitting import Outcome, TrialPlan, fit_once, fit_trial
from lightning_dpo.tuning.records import TrialRecord, lost_to
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.strategies import make_strategy

__all__ = ["run_once", "run_workers"]

_FOLDER = "workers"


def run_workers(plan: TrialPlan, record: TrialRecord) -> None:
    """Run a trial as a group of workers; a lost worker makes the group start again from its checkpoint.

    Args:
        plan: The sweep.
        record: What is known of the trial.
    """
    from ray.tune.integration.ray_train import TuneReportCallback

    group = _group(
        plan,
        _train_worker,
        {"plan": plan, "trial": record.id, "overrides": dict(record.overrides)},
        name=record.id,
        callbacks=[TuneReportCallback()],  # type: ignore[no-untyped-call]
    )
    try:
        group.fit()
    except train.TrainingFailedError as error:
        from lightning_dpo.tuning.trial import finish

        # A worker that was killed for the machine's memory leaves no record of its own.
        known = TrialRecord.load(plan.records, record.id) or record
        if known.status == "running":
            finish(plan, known, Outcome(*lost_to(str(error))))
            return
    ended = TrialRecord.load(plan.records, record.id)
    if ended is not None and ended.status not in ("running", "finished"):
        worst = {goal.metric: goal.worst for goal in plan.objective.goals}
        tune.report({**ended.metrics, **worst, "status": ended.status})


def run_once(plan: TrialPlan, trainer_options: Mapping[str, Any]) -> None:
    """Run the recipe as a group of workers, outside of any trial.

    Args:
        plan: The sweep.
        trainer_options: Take the place of the recipe's trainer arguments.
    """
    group = _group(plan, _once_worker, {"plan": plan, "options": dict(trainer_options)}, name="prepare")
    group.fit()


def _group(
    plan: TrialPlan,
    function: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    *,
    name: str,
    callbacks: Sequence[Any] = (),
) -> TorchTrainer:
    storage = Storage(plan.location) / _FOLDER
    resources = {"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})}
    # Large values travel through the object store, once for each machine.
    reference = ray.put(arguments)
    return TorchTrainer(
        _unpacked,
        train_loop_config={"function": function, "arguments": [reference]},
        scaling_config=train.ScalingConfig(
            num_workers=plan.workers, use_gpu=plan.gpus > 0, resources_per_worker=resources
        ),
        run_config=train.RunConfig(
            name=name,
            storage_path=storage.path,
            failure_config=train.FailureConfig(max_failures=plan.retries),
            checkpoint_config=train.CheckpointConfig(num_to_keep=1),
            callbacks=list(callbacks),
            **storage.ray_options(),
        ),
    )


def _unpacked(config: dict[str, Any]) -> None:
    config["function"](ray.get(config["arguments"][0]))


def _once_worker(arguments: dict[str, Any]) -> None:
    plan = arguments["plan"]
    fit_once(plan, {**_options(plan), **arguments["options"]})


def _train_worker(arguments: dict[str, Any]) -> None:
    plan: TrialPlan = arguments["plan"]
    trial: str = arguments["trial"]
    is_first = train.get_context().get_world_rank() == 0
    state = TrialRecord.load(plan.records, trial) or TrialRecord(trial, arguments["overrides"])
    if state.status not in ("running", "stopped"):
        return  # started again after a failure that would come again
    started = train.get_checkpoint()

    def begin(saved: dict[str, Any] | None = None) -> None:
        nonlocal state
        state = state.restarted(saved)
        if is_first:
            state.save(plan.records)

    def send(metrics: dict[str, Any], folder: Path | None) -> None:
        nonlocal state
        totals = {name: metrics[name] for name in ("total_steps", "startup_seconds", "reference_passes")}
        state = state.reported(metrics, **totals)
        if is_first:
            state.save(plan.records)
        found = folder is not None and folder.is_dir()
        train.report(metrics, checkpoint=train.Checkpoint.from_directory(str(folder)) if found else None)

    if started is None:
        begin()
        outcome = fit_trial(plan, state.overrides, send, trainer_options=_options(plan))
    else:
        from lightning_dpo.tuning.trial import saved_report

        with started.as_directory() as folder:
            begin(saved_report(Path(folder)))
            outcome = fit_trial(
                plan, state.overrides, send, checkpoint=Path(folder), trainer_options=_options(plan)
            )
    if is_first or outcome.status != "finished":
        status: Any = outcome.status
        ended = replace(state, status=status, reason=outcome.reason, extra={"traceback": outcome.details})
        ended.save(plan.records)
    if outcome.status != "finished":
        # Where one worker leaves, the others may wait for it for ever: Ray ends them all.
        raise RuntimeError(f"{outcome.status}: {outcome.reason}")


def _options(plan: TrialPlan) -> dict[str, Any]:
    from ray.train.lightning import RayLightningEnvironment

    return {
        "devices": "auto" if plan.gpus else 1,
        "num_nodes": 1,
        "accelerator": "gpu" if plan.gpus else "cpu",
        "strategy": make_strategy(plan.strategy),
        "plugins": [RayLightningEnvironment()],  # type: ignore[no-untyped-call]
    }
