"""From what trials wrote and what only Ray knows to the sweep's result."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

from ray.tune import Result, ResultGrid

from lightning_dpo.tuning.results.folder import save_result
from lightning_dpo.tuning.results.ranking import rank
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.ending import outcome_of_dead_process
from lightning_dpo.tuning.trial.record import TrialRecord, load_records
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.trial.status import TrialStatus

__all__ = ["gather"]

_PACKAGES = ("lightning-dpo", "lightning", "torch", "transformers", "ray", "optuna")


def gather(
    spec: TrialSpec,
    outcome: ResultGrid,
    *,
    settings: Mapping[str, Any],
    machines: Sequence[Mapping[str, float]],
    reference_passes: int,
    seconds: float,
    note: str = "",
) -> SweepResult:
    """Put together what became of all trials.

    Args:
        spec: What the sweep's trials have in common.
        outcome: What Ray knows of the trials.
        settings: The sweep's configuration, as plain values.
        machines: CPUs and GPUs of each machine, as Ray names them.
        reference_passes: Passes of the reference over the data before the first trial.
        seconds: Wall time of the sweep.
        note: A line for the head of the best recipe.

    Raises:
        ValueError: If every trial went wrong; what is known of them is saved all the same.
    """
    known = {record.id: record for record in load_records(spec.records)}
    trials = []
    for number, ray_trial in enumerate(outcome._experiment_analysis.trials):
        overrides = spec.space.overrides(ray_trial.config)
        record = known.get(ray_trial.trial_id) or TrialRecord(ray_trial.trial_id, overrides)
        trials.append(_completed(record, outcome[number]))
    result = SweepResult(
        location=Storage(spec.location).location,
        objective=spec.objective,
        trials=rank(trials, spec.objective),
        reference_passes=reference_passes + sum(trial.reference_passes > 0 for trial in trials),
        seconds=round(seconds, 1),
        settings=dict(settings),
        environment=_environment(machines),
    )
    if not trials or not result.best.is_ranked:
        save_result(result)
        reasons = [f"{t.status}: {t.reason}" for t in trials if t.reason]
        raise ValueError(f"every trial went wrong; the first one: {reasons[0] if reasons else 'none ran'}")
    return replace(result, recipe=_best_recipe(spec, result, note))


def _completed(record: TrialRecord, ray_result: Result) -> TrialRecord:
    """The record with what the trial could not know: that a scheduler stopped it, or Ray gave it up."""
    metrics = ray_result.metrics or {}
    if ray_result.checkpoint is not None:
        record = replace(record, checkpoint=ray_result.checkpoint.path)
    elif "checkpoint_path" in metrics:
        record = replace(record, checkpoint=metrics["checkpoint_path"])
    if ray_result.error is not None:
        status, reason, _ = outcome_of_dead_process(str(ray_result.error))
        return replace(record, status=status, reason=reason)
    if record.status.is_over:
        return record
    # Tune ends a trial that a scheduler stops, and does so at its last report too.
    is_complete = 0 < record.total_steps <= record.step
    return replace(record, status=TrialStatus.FINISHED if is_complete else TrialStatus.STOPPED)


def _best_recipe(spec: TrialSpec, result: SweepResult, note: str) -> str:
    goal, best = result.objective.primary, result.best
    header = (
        f"# The best trial ({best.id}) of {result.location}: {goal.metric} {best.metrics[goal.metric]:.4f} "
        f"at step {best.step}.\n#\n#   lightning-dpo fit --config config.yaml\n"
    )
    if note:
        header += f"#\n# {note}\n"
    return header + spec.recipe.parse(best.overrides).to_yaml()


def _environment(machines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machines": [{name: machine.get(name, 0) for name in ("CPU", "GPU")} for machine in machines],
    }
