"""The files of a sweep that has ended: what was found, the best recipe, and the table of all reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from lightning_dpo.files import parquet_bytes
from lightning_dpo.tuning.objective import Goal, Objective
from lightning_dpo.tuning.results.comparison import Comparison
from lightning_dpo.tuning.results.ranking import rank
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.record import TrialRecord, load_records

__all__ = ["load_result", "save_result"]

_SUMMARY = "sweep.json"
_RECIPE = "best/config.yaml"
_RECOMMENDED_RECIPE = "recommended/config.yaml"
_TABLE = "results.parquet"


def save_result(result: SweepResult) -> None:
    """Write what was found into the sweep's folder, where the trials' own records lie already."""
    storage = Storage(result.location)
    summary = {
        "objective": [{"metric": g.metric, "mode": g.mode} for g in result.objective.goals],
        "statuses": {t.id: [t.status, t.reason, t.checkpoint] for t in (*result.trials, *result.reruns)},
        "reference_passes": result.reference_passes,
        "seconds": result.seconds,
        "settings": result.settings,
        "environment": result.environment,
        "model": result.model,
    }
    if result.data_fingerprint:
        summary["data"] = result.data_fingerprint
    if result.comparisons:
        summary["comparisons"] = {trial: asdict(one) for trial, one in result.comparisons.items()}
        summary["recommended"] = result.recommended.id
        summary["recommended_model"] = result.recommended_model
    storage.write(_SUMMARY, json.dumps(summary, indent=1, default=str))
    if result.recipe:
        storage.write(_RECIPE, result.recipe)
    if result.recommended_recipe:
        storage.write(_RECOMMENDED_RECIPE, result.recommended_recipe)
    storage.write(_TABLE, _parquet((*result.trials, *result.reruns)))


def load_result(location: str) -> SweepResult:
    """Read the folder of a sweep that has ended.

    Args:
        location: The folder, or its URL.

    Raises:
        ValueError: If there is no sweep in it.
    """
    storage = Storage(location)
    text = storage.read(_SUMMARY)
    if text is None and (begun := (storage / "trials").names(".json")):
        raise ValueError(
            f"`folder` must be that of a sweep that has ended, got {location!r}, where {len(begun)} trials "
            "have begun and no sweep.json tells of the end: wait for it, or go on with it by --resume"
        )
    if text is None:
        raise ValueError(f"`folder` must be that of a sweep, with {_SUMMARY} in it, got {location!r}")
    summary = json.loads(text)
    records = []
    for record in load_records(storage / "trials"):
        status, reason, checkpoint = summary["statuses"].get(record.id, [record.status, record.reason, None])
        records.append(replace(record, status=status, reason=reason, checkpoint=checkpoint))
    objective = Objective(tuple(Goal(**goal) for goal in summary["objective"]))
    trials = [record for record in records if not record.rerun_of]
    reruns = tuple(record for record in records if record.rerun_of)
    return SweepResult(
        location=storage.location,
        objective=objective,
        trials=rank(trials, objective, reruns),
        reruns=reruns,
        reference_passes=summary["reference_passes"],
        seconds=summary["seconds"],
        settings=summary["settings"],
        environment=summary["environment"],
        recipe=storage.read(_RECIPE) or "",
        model=summary["model"],
        recommended_recipe=storage.read(_RECOMMENDED_RECIPE) or "",
        recommended_model=summary.get("recommended_model"),
        data_fingerprint=summary.get("data", ""),
        comparisons={
            trial: Comparison.from_json(one) for trial, one in summary.get("comparisons", {}).items()
        },
    )


def _parquet(trials: Sequence[TrialRecord]) -> bytes:
    """The content of `results.parquet`: in each row a trial's values, one report and how the trial ended."""
    import pyarrow as pa

    rows = [
        {
            "trial": trial.id,
            "status": trial.status,
            "reason": trial.reason,
            **({"rerun_of": trial.rerun_of, "purpose": trial.purpose} if trial.rerun_of else {}),
            **{f"config/{path}": _plain(value) for path, value in trial.overrides.items()},
            **_kept_columns(trial, entry),
            **entry,
        }
        for trial in trials
        for entry in (trial.history or ({},))
    ]
    columns = dict.fromkeys(name for row in rows for name in row)
    data = {name: _uniform([row.get(name) for row in rows]) for name in columns}
    return parquet_bytes(pa.table(data))


def _kept_columns(trial: TrialRecord, report: Mapping[str, Any]) -> dict[str, Any]:
    """Of a trial that kept its best step: which report that is, and what ranks the trial."""
    kept = trial.kept
    if kept is None:
        return {}
    return {
        "kept": report.get("step") == kept.step,
        "kept_step": kept.step,
        f"kept/{kept.metric}": kept.ranking,
        f"kept/{kept.metric}/choosing": kept.choosing,
    }


def _uniform(values: list[Any]) -> list[Any]:
    """Values of one type, since a choice may mix numbers and texts."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or len(kinds) < 2:
        return [float(v) if v is not None and float in kinds else v for v in values]
    return [None if value is None else str(value) for value in values]


def _plain(value: Any) -> Any:
    """A value that a column can hold; lists and mappings become JSON."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
