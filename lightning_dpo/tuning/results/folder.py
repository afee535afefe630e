"""The files of a sweep that has ended: what was found, the best recipe, and the table of all reports."""

from __future__ import annotations

import json
from dataclasses import replace

from lightning_dpo.tuning.objective import Goal, Objective
from lightning_dpo.tuning.results.ranking import rank
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.results.table import parquet_bytes
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.record import load_records

__all__ = ["load_result", "save_result"]

_SUMMARY = "sweep.json"
_RECIPE = "best/config.yaml"
_TABLE = "results.parquet"


def save_result(result: SweepResult) -> None:
    """Write what was found into the sweep's folder, where the trials' own records lie already."""
    storage = Storage(result.location)
    summary = {
        "objective": [{"metric": g.metric, "mode": g.mode} for g in result.objective.goals],
        "statuses": {t.id: [t.status, t.reason, t.checkpoint] for t in result.trials},
        "reference_passes": result.reference_passes,
        "seconds": result.seconds,
        "settings": result.settings,
        "environment": result.environment,
        "model": result.model,
    }
    storage.write(_SUMMARY, json.dumps(summary, indent=1, default=str))
    if result.recipe:
        storage.write(_RECIPE, result.recipe)
    storage.write(_TABLE, parquet_bytes(result.trials))


def load_result(location: str) -> SweepResult:
    """Read the folder of a sweep that has ended.

    Args:
        location: The folder, or its URL.

    Raises:
        ValueError: If there is no sweep in it.
    """
    storage = Storage(location)
    text = storage.read(_SUMMARY)
    if text is None:
        raise ValueError(f"`folder` must be that of a sweep, with {_SUMMARY} in it, got {location!r}")
    summary = json.loads(text)
    records = []
    for record in load_records(storage / "trials"):
        status, reason, checkpoint = summary["statuses"].get(record.id, [record.status, record.reason, None])
        records.append(replace(record, status=status, reason=reason, checkpoint=checkpoint))
    objective = Objective(tuple(Goal(**goal) for goal in summary["objective"]))
    return SweepResult(
        location=storage.location,
        objective=objective,
        trials=rank(records, objective),
        reference_passes=summary["reference_passes"],
        seconds=summary["seconds"],
        settings=summary["settings"],
        environment=summary["environment"],
        recipe=storage.read(_RECIPE) or "",
        model=summary["model"],
    )
