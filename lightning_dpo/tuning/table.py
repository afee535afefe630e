"""The table of trials in the terminal, while a sweep runs and at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ray.tune import Callback
from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from lightning_dpo.tuning.fitting import TrialPlan
    from lightning_dpo.tuning.results import SweepResult

__all__ = ["LiveTable", "print_summary"]

_ROWS = 20

_active: LiveTable | None = None
"""The table that is shown. Tune pickles its callbacks, and a resumed sweep gets the old one back."""


@dataclass(slots=True)
class _Row:
    overrides: Mapping[str, Any]
    status: str = "running"
    metrics: Mapping[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.time)


class LiveTable:
    """Trials with their values, steps, metrics and the time that is left; on a terminal it stays in place."""

    def __init__(self, plan: TrialPlan, *, samples: int, verbose: bool = True) -> None:
        """Begin with no trials.

        Args:
            plan: The sweep.
            samples: Trials that there will be.
            verbose: Show anything.
        """
        self._plan = plan
        self._samples = samples
        self._rows: dict[str, _Row] = {}
        self._console = Console(stderr=not sys.stdout.isatty())
        self._live = Live(console=self._console, auto_refresh=False) if verbose else None
        self.callback = _TableCallback()

    def __enter__(self) -> LiveTable:
        """Show the table."""
        global _active
        _active = self
        if self._live is not None and self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        global _active
        _active = None
        if self._live is not None:
            self._live.stop()

    def update(
        self, trial: Any, *, status: str | None = None, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Take over what Tune says of a trial."""
        overrides = self._plan.space.overrides(trial.config)
        row = self._rows.setdefault(trial.trial_id, _Row(overrides))
        row.overrides = overrides
        if metrics and "step" in metrics:
            row.metrics = metrics
        if metrics and "status" in metrics:
            row.status = metrics["status"]
        elif status is not None and (row.status == "running" or status == "failed"):
            row.status = self._ended(row) if status == "ended" else status
        if self._live is None:
            return
        if self._console.is_terminal:
            self._live.update(self.render(), refresh=True)
        elif status in ("ended", "failed"):
            self._console.print(_line(trial.trial_id, row, self._plan), highlight=False)

    def render(self) -> Table:
        """The table as it is now, the newest trials where there are many."""
        goals = [goal.metric for goal in self._plan.objective.goals]
        shown = list(self._rows.items())[-_ROWS:]
        paths = list(dict.fromkeys(path for _, row in shown for path in row.overrides))
        done = sum(row.status != "running" for row in self._rows.values())
        table = Table(title=f"{done} of {self._samples} trials have ended", title_justify="left")
        for name in ("trial", *(path.rpartition(".")[2] for path in paths), "step"):
            table.add_column(name)
        for name in (*(goal.rpartition("/")[2] for goal in goals), *_kl_column(goals), "ETA", "status"):
            table.add_column(name, justify="right")
        for trial, row in shown:
            values = [_short(row.overrides.get(path)) for path in paths]
            step = f"{row.metrics.get('step', 0)}/{row.metrics.get('total_steps') or '?'}"
            metrics = [_number(row.metrics.get(name)) for name in (*goals, *_kl_metric(goals))]
            table.add_row(trial[-5:], *values, step, *metrics, _eta(row), row.status)
        return table

    def _ended(self, row: _Row) -> str:
        total = row.metrics.get("total_steps") or 0
        return "stopped" if row.metrics.get("step", 0) < total else "finished"


class _TableCallback(Callback):
    """Passes on what happens; holds nothing, so that it can be pickled."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._tell(trial, metrics=result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, status="ended")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, status="failed")

    def _tell(self, trial: Any, **changes: Any) -> None:
        if _active is not None:
            _active.update(trial, **changes)


def print_summary(result: SweepResult) -> None:
    """The last lines of a sweep."""
    console = Console()
    goal = result.objective.primary
    best = result.best
    values = ", ".join(f"{path} {_short(value)}" for path, value in best.overrides.items())
    counts: dict[str, int] = {}
    for trial in result.trials:
        counts[trial.status] = counts.get(trial.status, 0) + 1
    trials = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [
        f"best: {goal.metric} {best.metrics[goal.metric]:.4f} with {values}",
        f"trials: {len(result.trials)} ({trials}) in {result.seconds:.0f} s",
        f"reference passes: {result.reference_passes}",
        f"recipe: {result.location}/best/config.yaml",
        *([f"model: {result.model}"] if result.model else []),
        f"report: {result.report_path}",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _kl_column(goals: list[str]) -> list[str]:
    return ["kl" for _ in _kl_metric(goals)]


def _kl_metric(goals: list[str]) -> list[str]:
    return [] if "val/kl" in goals else ["val/kl"]


def _line(trial: str, row: _Row, plan: TrialPlan) -> str:
    values = ", ".join(f"{path} {_short(value)}" for path, value in row.overrides.items())
    metrics = ", ".join(f"{g.metric} {_number(row.metrics.get(g.metric))}" for g in plan.objective.goals)
    return f"trial {trial} {row.status} at step {row.metrics.get('step', 0)}: {metrics} ({values})"


def _eta(row: _Row) -> str:
    step, total = row.metrics.get("step", 0), row.metrics.get("total_steps") or 0
    if row.status != "running" or not step or not total:
        return ""
    left = row.metrics.get("seconds", 0.0) / step * max(total - step, 0)
    return f"{left:.0f} s"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else ""


def _short(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value).rpartition(".")[2] if isinstance(value, str) else str(value)
