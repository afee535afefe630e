"""What a sweep found: the best trial, the frontier, and the files that hold it all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_dpo.tuning.objective import Goal, Objective, pareto_front
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.record import TrialRecord, load_records

__all__ = ["SweepResult", "TrialRecord", "load_result", "save_result"]

_SUMMARY = "sweep.json"
KL = "val/kl"


@dataclass(frozen=True)
class SweepResult:
    """A sweep that has ended.

    Attributes:
        location: The sweep's folder or URL.
        objective: What was maximised.
        trials: All of them, best first; those that went wrong last.
        reference_passes: Passes of the reference over the data: one if it was shared.
        seconds: Wall time.
        settings: The sweep's configuration, as plain values.
        environment: Versions and machines.
        recipe: The best trial's complete configuration for `fit`, YAML.
        model: Where the best trial's model is, or None.
    """

    location: str
    objective: Objective
    trials: tuple[TrialRecord, ...]
    reference_passes: int = 0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    model: str | None = None

    @property
    def best(self) -> TrialRecord:
        """The trial with the best last report of the first goal."""
        return self.trials[0]

    @property
    def frontier_goals(self) -> tuple[Goal, ...]:
        """The goals of the frontier: the objective's, and the KL where it was measured."""
        goals = self.objective.goals
        measured = any(KL in trial.metrics for trial in self.trials)
        if len(goals) == 1 and measured and goals[0].metric != KL:
            return (*goals, Goal(KL, "min"))
        return goals

    @property
    def frontier(self) -> tuple[TrialRecord, ...]:
        """The trials that no other one beats in all goals at once, for example in accuracy and KL."""
        goals = self.frontier_goals
        ranked = [t for t in self.trials if t.is_ranked and all(g.metric in t.metrics for g in goals)]
        points = [[g.score(t.metrics[g.metric]) for g in goals] for t in ranked]
        return tuple(ranked[index] for index in pareto_front(points))

    @property
    def report_path(self) -> str:
        """The report: one HTML file."""
        return f"{self.location}/report.html"


def rank(trials: Sequence[TrialRecord], objective: Objective) -> tuple[TrialRecord, ...]:
    """Best first, by the last report of the first goal; trials that went wrong come last.

    Of trials that are equal in it, the one with the better other goals comes first, then that with the lower
    KL: it needed to move less from the reference.
    """
    goals = (*objective.goals, Goal(KL, "min"))

    def key(trial: TrialRecord) -> tuple[Any, ...]:
        values = (trial.metrics.get(goal.metric) for goal in goals)
        scores = (
            -goal.score(value) if value is not None else float("inf")
            for goal, value in zip(goals, values, strict=True)
        )
        return (not trial.is_ranked, *scores, trial.id)

    return tuple(sorted(trials, key=key))


def save_result(result: SweepResult) -> None:
    """Write everything but the trials' own records, which are there already, and `results.parquet`."""
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
        storage.write("best/config.yaml", result.recipe)
    _write_parquet(storage, result.trials)


def load_result(location: str) -> SweepResult:
    """Read a sweep's folder.

    Raises:
        ValueError: If there is no sweep in it.
    """
    from dataclasses import replace

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
        recipe=storage.read("best/config.yaml") or "",
        model=summary["model"],
    )


def _write_parquet(storage: Storage, trials: Sequence[TrialRecord]) -> None:
    """One row for each report of each trial: its values, its metrics and how it ended."""
    import tempfile
    from pathlib import Path

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "trial": trial.id,
            "status": trial.status,
            "reason": trial.reason,
            **{f"config/{path}": _plain(value) for path, value in trial.overrides.items()},
            **entry,
        }
        for trial in trials
        for entry in (trial.history or ({},))
    ]
    columns = dict.fromkeys(name for row in rows for name in row)
    data = {name: _uniform([row.get(name) for row in rows]) for name in columns}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.parquet"
        pq.write_table(pa.table(data), file)
        storage.put(file, "results.parquet")


def _uniform(values: list[Any]) -> list[Any]:
    """Values of one type, since a choice may mix numbers and texts."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or len(kinds) < 2:
        return [float(v) if v is not None and float in kinds else v for v in values]
    return [None if value is None else str(value) for value in values]


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
