"""The table of trials in the terminal, while a sweep runs and at its end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ray.tune import Callback
from rich.console import Console
from rich.live import Live

from lightning_dpo.tuning.report.labels import metric_name, number, path_names, value_text
from lightning_dpo.tuning.report.table_rows import Row, plain_line, progress, table_of

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_dpo.tuning.results.result import SweepResult
    from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["LiveTable", "print_summary"]

_LAST_ROWS = 40
"""Rows of the table that stays; the report holds all of them."""

_QUIET_SECONDS = 60.0
"""Where there is no terminal, a line tells at least as often that the sweep goes on."""

_WENT_WELL = ("finished", "stopped")

_active: LiveTable | None = None
"""The table that is shown. Tune pickles its callbacks, and a resumed sweep gets the old one back."""


class LiveTable:
    """Trials with their values, steps, metrics and the time that is left; on a terminal it stays in place."""

    def __init__(
        self, plan: TrialSpec, *, samples: int, verbose: bool = True, console: Console | None = None
    ) -> None:
        """Begin with no trials.

        Args:
            plan: The sweep.
            samples: Trials that there will be.
            verbose: Show anything.
            console: Where to; by default the terminal, be it only that of the error output.
        """
        self._plan = plan
        self._samples = samples
        self._rows: dict[str, Row] = {}
        self._console = console or Console(stderr=not sys.stdout.isatty())
        self._verbose = verbose
        self._began = self._told = time.time()
        self._ended = False
        # The screen is drawn by another thread, so that the time left counts down between reports.
        self._lock = threading.Lock()
        self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=2)
        self.callback = _TableCallback()

    def __enter__(self) -> LiveTable:
        """Show the table."""
        global _active
        _active = self
        if self._verbose and self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen, the best trials first."""
        global _active
        _active = None
        self._ended = True
        self._live.stop()

    def update(
        self, trial: Any, *, status: str | None = None, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Take over what Tune says of a trial."""
        overrides = self._plan.space.overrides(trial.config)
        with self._lock:
            row = self._rows.setdefault(trial.trial_id, Row(trial.trial_id, overrides))
            row.overrides = overrides
            told = metrics.get("status") if metrics else None
            # Of a trial that went wrong Tune hears the worst value that there is, which is no measurement.
            if metrics and "step" in metrics and (told is None or told in _WENT_WELL):
                row.heard(metrics)
            if told is not None:
                row.status = told
            elif status is not None and (row.status == "running" or status == "failed"):
                row.status = row.ended() if status == "ended" else status
        if self._verbose and not self._console.is_terminal:
            self._tell(row, is_over=status in ("ended", "failed"))

    def render(self) -> Table:
        """The table as it is now; where the terminal has too few lines, running trials and the newest."""
        with self._lock:
            rows = list(self._rows.values())
            goals = self._plan.objective.goals
            size = self._console.size
            # Title, heads, lines, and what is left out take six lines.
            count = _LAST_ROWS if self._ended else max(size.height - 6, 3)
            return table_of(
                rows,
                goals=goals,
                title=progress(rows, samples=self._samples, began=self._began, is_over=self._ended),
                count=count,
                width=size.width,
                best_first=self._ended,
            )

    def _tell(self, row: Row, *, is_over: bool) -> None:
        now = time.time()
        if is_over:
            self._print(plain_line(row, self._plan.objective.goals))
        elif now - self._told >= _QUIET_SECONDS:
            rows = list(self._rows.values())
            self._print(progress(rows, samples=self._samples, began=self._began))

    def _print(self, line: str) -> None:
        self._told = time.time()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


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
    best = result.best
    names = path_names(best.overrides)
    values = ", ".join(f"{names[path]} {value_text(value)}" for path, value in best.overrides.items())
    goals = [goal.metric for goal in result.frontier_goals if goal.metric in best.metrics]
    measured = ", ".join(f"{metric_name(metric)} {number(best.metrics[metric], 4)}" for metric in goals)
    counts: dict[str, int] = {}
    for trial in result.trials:
        counts[trial.status] = counts.get(trial.status, 0) + 1
    trials = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [
        f"best: {measured} with {values}",
        f"trials: {len(result.trials)} ({trials}) in {result.seconds:.0f} s",
        f"reference passes: {result.reference_passes}",
        f"recipe: {result.location}/best/config.yaml",
        *([f"model: {result.model}"] if result.model else []),
        f"report: {result.report_path}",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
