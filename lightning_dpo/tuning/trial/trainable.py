"""The function that Ray Tune runs for each trial."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune

from lightning_dpo.tuning.trial.fit import Outcome, TrialPlan, fit_trial, here
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.report_callback import PROGRESS

__all__ = ["finish", "run_trial", "saved_report"]


def run_trial(config: Mapping[str, Any], *, plan: TrialPlan) -> None:
    """Run one trial, or report it again if it is known to have ended.

    Args:
        config: What the searcher chose.
        plan: What all trials share.
    """
    trial = tune.get_context().get_trial_id()
    overrides = plan.space.overrides(config)
    record = TrialRecord.load(plan.records, trial) or TrialRecord(trial, overrides)
    if record.status not in ("running", "stopped"):
        # A driver that was killed may not have heard of the end.
        tune.report({**record.metrics, **_goals(plan, record), "status": record.status})
        return
    if plan.workers > 1:
        from lightning_dpo.tuning.workers.run import run_workers

        run_workers(plan, replace(record, overrides=overrides))
        return
    _run_here(plan, replace(record, overrides=overrides))


def _run_here(plan: TrialPlan, record: TrialRecord) -> None:
    checkpoint = tune.get_checkpoint()
    state = record

    def send(metrics: dict[str, Any], folder: Path | None) -> None:
        nonlocal state
        assert folder is not None
        state = state.reported(metrics, **_totals(metrics))
        state.save(plan.records)
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))

    options = here(plan)
    record = replace(record, extra={"node": ray.get_runtime_context().get_node_id()})
    if checkpoint is None:
        state = record.restarted()
        state.save(plan.records)
        outcome = fit_trial(plan, record.overrides, send, trainer_options=options)
    else:
        with checkpoint.as_directory() as folder:
            saved = saved_report(Path(folder))
            begun = state = record.restarted(saved)
            state.save(plan.records)
            outcome = fit_trial(
                plan, record.overrides, send, checkpoint=Path(folder), trainer_options=options
            )
            if state is begun and outcome.status == "finished":
                # Nothing was left to train: with PBT the checkpoint may be the last one of another trial.
                tune.report(saved, checkpoint=checkpoint)
    finish(plan, state, outcome)


def finish(plan: TrialPlan, record: TrialRecord, outcome: Outcome) -> None:
    """Record how a trial ended, and tell Tune: a trial that went wrong counts as the worst there is."""
    status: Any = outcome.status
    ended = replace(
        record, status=status, reason=outcome.reason, extra={**record.extra, "traceback": outcome.details}
    )
    ended.save(plan.records)
    if status != "finished":
        tune.report({**ended.metrics, **_goals(plan, ended), "status": status})


def _goals(plan: TrialPlan, record: TrialRecord) -> dict[str, float]:
    """The objective's metrics: as last reported, or the worst where the trial went wrong."""
    is_good = record.status == "finished" and record.history
    return {
        goal.metric: record.metrics[goal.metric] if is_good else goal.worst for goal in plan.objective.goals
    }


def _totals(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: metrics[name] for name in ("total_steps", "startup_seconds", "reference_passes")}


def saved_report(folder: Path) -> dict[str, Any]:
    """What was reported with a checkpoint."""
    report: dict[str, Any] = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    return report
