"""A trial of one process, which trains within the process that Tune gave it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune

from lightning_dpo.tuning.trial.ending import end_trial
from lightning_dpo.tuning.trial.fit import fit_trial, local_trainer_options
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.report_callback import saved_report
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.trial.status import TrialStatus

__all__ = ["run_in_one_process"]


def run_in_one_process(spec: TrialSpec, record: TrialRecord) -> None:
    """Run a trial, from the checkpoint that Tune has for it, if any.

    Args:
        spec: What the sweep's trials have in common.
        record: What is known of the trial.
    """
    record = replace(record, extra={"node": ray.get_runtime_context().get_node_id()})
    state = record

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        nonlocal state
        assert folder is not None
        state = state.reported(metrics)
        state.save(spec.records)
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))

    options = local_trainer_options(spec.resources)
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        state = record.restarted()
        state.save(spec.records)
        outcome = fit_trial(spec, record.overrides, report, trial=record.id, trainer_options=options)
    else:
        with checkpoint.as_directory() as name:
            folder = Path(name)
            saved = saved_report(folder)
            begun = state = record.restarted(saved)
            state.save(spec.records)
            outcome = fit_trial(
                spec,
                record.overrides,
                report,
                trial=record.id,
                checkpoint=folder,
                trainer_options=options,
            )
            if state is begun and outcome.status is TrialStatus.FINISHED:
                # Nothing was left to train: a scheduler paused the trial at its end, or with PBT the
                # checkpoint is the last one of another trial. To pause at a report that says so is too late.
                end_trial(spec, state, outcome)
                tune.report({**saved, "status": str(outcome.status)}, checkpoint=checkpoint)
                return
    end_trial(spec, state, outcome)
