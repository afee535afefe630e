"""From what trials wrote and what only Ray knows to the sweep's result."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

from ray.tune import Result, ResultGrid

from lightning_dpo.tuning.cluster.retry import was_interrupted
from lightning_dpo.tuning.results.comparison import Comparison, compare
from lightning_dpo.tuning.results.folder import save_result
from lightning_dpo.tuning.results.kept import kept_step_note
from lightning_dpo.tuning.results.ranking import rank
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.results.runs import counted_runs
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.ending import INTERRUPTED, outcome_of_dead_process
from lightning_dpo.tuning.trial.outcomes import PairOutcomes, kept_outcomes, load_outcomes
from lightning_dpo.tuning.trial.record import TrialRecord, load_records
from lightning_dpo.tuning.trial.resume import remove_spent
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.trial.status import TrialStatus

__all__ = ["completed_trials", "gather", "is_interrupted"]

_PACKAGES = ("lightning-dpo", "lightning", "torch", "transformers", "ray", "optuna")

_TOLERANCE = 1e-3
"""That a metric may differ from the mean over the pairs: outcomes of other weights differ more, or not."""


def gather(
    spec: TrialSpec,
    trials: Sequence[TrialRecord],
    *,
    settings: Mapping[str, Any],
    machines: Sequence[Mapping[str, float]],
    reference_passes: int,
    seconds: float,
    note: str = "",
    reruns: Sequence[TrialRecord] = (),
    data_fingerprint: str = "",
) -> SweepResult:
    """Put together what became of all trials.

    Args:
        spec: What the sweep's trials have in common.
        trials: Those of the search, as `completed_trials` gives them.
        settings: The sweep's configuration, as plain values.
        machines: CPUs and GPUs of each machine, as Ray names them.
        reference_passes: Passes of the reference over the data before the first trial.
        seconds: Wall time of the sweep.
        note: A line for the head of the best recipe.
        reruns: Runs of the trials' values with other seeds.
        data_fingerprint: Which data it was.

    Raises:
        ValueError: If every trial went wrong; what is known of them is saved all the same.
    """
    result = SweepResult(
        location=Storage(spec.location).location,
        objective=spec.objective,
        trials=rank(trials, spec.objective, reruns),
        reruns=tuple(reruns),
        reference_passes=reference_passes + sum(trial.reference_passes > 0 for trial in trials),
        seconds=round(seconds, 1),
        settings=dict(settings),
        environment=_environment(machines),
        data_fingerprint=data_fingerprint,
    )
    if not trials or not result.best.is_ranked:
        save_result(result)
        if is_interrupted(trials):
            raise ValueError(
                f"the sweep in {result.location} was interrupted before a trial had a result; go on with it "
                "by resume=True (--resume)"
            )
        budget = settings.get("time_budget")
        if budget and not any(trial.reason for trial in trials):
            raise ValueError(
                f"no trial had a result when `time_budget` was over, got {budget:g} seconds: give more, or "
                "let trials validate earlier, by `trainer.val_check_interval`"
            )
        reasons = [f"{t.status}: {t.reason}" for t in trials if t.reason]
        raise ValueError(f"every trial went wrong; the first one: {reasons[0] if reasons else 'none ran'}")
    result = replace(result, comparisons=_comparisons(spec, result))
    chosen = result.recommended
    return replace(
        result,
        recipe=_recipe(spec, result, result.best, "best", note),
        recommended_recipe=""
        if chosen is result.best
        else _recipe(spec, result, chosen, "recommended", note),
    )


def is_interrupted(trials: Sequence[TrialRecord]) -> bool:
    """Whether a user ended the sweep while some of these trials ran.

    Args:
        trials: As `completed_trials` gives them.
    """
    return any(trial.reason == INTERRUPTED for trial in trials)


def completed_trials(spec: TrialSpec, outcome: ResultGrid) -> list[TrialRecord]:
    """What is known of each trial, from its own record and from Ray.

    Args:
        spec: What the trials have in common.
        outcome: What Ray knows of them.
    """
    known = {record.id: record for record in load_records(spec.records)}
    trials = []
    for number, ray_trial in enumerate(outcome._experiment_analysis.trials):
        record, told = known.get(ray_trial.trial_id), outcome[number]
        if record is None and told.error is None and not told.metrics:
            continue  # the sweep ended before it began
        record = record or spec.new_record(ray_trial.trial_id, ray_trial.config)
        trials.append(_completed(record, told, spec, interrupted=was_interrupted(outcome)))
    _remove_spent(spec, outcome, trials)
    return sorted(trials, key=lambda trial: trial.id)  # as they began: Ray restores them in another order


def _completed(record: TrialRecord, ray_result: Result, spec: TrialSpec, *, interrupted: bool) -> TrialRecord:
    """The record with what the trial could not know: who stopped it, or that Ray gave it up."""
    metrics = ray_result.metrics or {}
    if record.checkpoint is not None:
        pass
    elif ray_result.checkpoint is not None:  # of a sweep that an older version began
        record = replace(record, checkpoint=ray_result.checkpoint.path)
    elif "checkpoint_path" in metrics:
        record = replace(record, checkpoint=metrics["checkpoint_path"])
    if ray_result.error is not None:
        status, reason, _ = outcome_of_dead_process(str(ray_result.error))
        return replace(record, status=status, reason=reason)
    if record.status.is_over:
        return record
    if interrupted and not metrics.get("done"):
        return replace(record, status=TrialStatus.STOPPED, reason=INTERRUPTED)
    # Tune ends a trial that a scheduler stops, and does so at its last report too.
    if 0 < record.total_steps <= record.step:
        return replace(record, status=TrialStatus.FINISHED)
    goal = spec.objective.primary
    values = [float(entry[goal.metric]) for entry in record.history if goal.metric in entry]
    return replace(record, status=TrialStatus.STOPPED, enough=spec.stop.ends(record.last, values, goal))


def _remove_spent(spec: TrialSpec, outcome: ResultGrid, trials: Sequence[TrialRecord]) -> None:
    """Remove what trials kept to go on from, if they are over: in an interrupted sweep they are not."""
    models = {trial.checkpoint for trial in trials}
    ended = {record.id for record in load_records(spec.records) if record.status.is_over}
    for number, ray_trial in enumerate(outcome._experiment_analysis.trials):
        is_done = bool((outcome[number].metrics or {}).get("done"))
        if ray_trial.trial_id in ended or is_done:
            remove_spent(spec, ray_trial.trial_id, models)


def _comparisons(spec: TrialSpec, result: SweepResult) -> dict[str, Comparison]:
    """Every trial beside the best one, where their outcomes are known and are those that were reported."""
    goal = spec.objective.primary
    outcomes: dict[str, list[PairOutcomes]] = {}
    for trial in result.trials:
        if trial.is_ranked:
            loaded = [_outcomes_of(run, spec) for run in counted_runs(trial, result.runs_again(trial))]
            found = [one for one in loaded if one is not None]
            if found:
                outcomes[trial.id] = found
    if result.best.id not in outcomes:
        return {}
    return compare(outcomes, goal=goal, confidence=result.confidence)


def _outcomes_of(run: TrialRecord, spec: TrialSpec) -> PairOutcomes | None:
    """What a run found for each pair that ranks it, if that is what it reported."""
    name = run.id if run.kept is None else kept_outcomes(run.id, run.kept.step)
    found = load_outcomes(spec.outcomes, name, step=run.model_step)
    reported = run.metrics[spec.objective.primary.metric]
    return found if found is not None and abs(found.mean - reported) <= _TOLERANCE else None


def _recipe(spec: TrialSpec, result: SweepResult, trial: TrialRecord, kind: str, note: str) -> str:
    metric = result.objective.primary.metric
    header = (
        f"# The {kind} trial ({trial.id}) of {result.location}: {metric} {trial.metrics[metric]:.4f} "
        f"at step {trial.model_step}.\n#\n#   lightning-dpo fit --config config.yaml\n"
    )
    found = result.mean(trial)
    seeds = ""
    if found is not None and found.runs > 1:
        seeds = f"Its mean over {found.runs} seeds, {found.mean:.4f}, is what ranks it."
    notes = [
        seeds,
        result.recommendation.reason if kind == "recommended" else "",
        kept_step_note(trial),
        note,
    ]
    for text in filter(None, notes):
        header += "#\n" + "".join(f"# {line}\n" for line in textwrap.wrap(text, 100))
    return header + spec.recipe.parse(trial.overrides).to_yaml()


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
