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

from lightning_dpo.tuning.report.trial_table import TrialLine, end_notice, progress_notice, trial_table

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["LiveTable"]

_LAST_LINES = 40
"""Lines of the table that stays; the report holds all of them."""

QUIET_SECONDS = 60.0
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
            console: By default the terminal, be it only that of the error output.
        """
        self._plan = plan
        self._samples = samples
        self._lines: dict[str, TrialLine] = {}
        self._console = console or Console(stderr=not sys.stdout.isatty())
        self._verbose = verbose
        self._began = self._printed_at = time.time()
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
            line = self._lines.setdefault(trial.trial_id, TrialLine(trial.trial_id, overrides))
            line.overrides = overrides
            told = metrics.get("status") if metrics else None
            # Of a trial that went wrong Tune hears the worst value that there is, which is no measurement.
            if metrics and "step" in metrics and (told is None or told in _WENT_WELL):
                line.report(metrics)
            if metrics and told is not None:
                line.status, line.reason = told, metrics.get("reason", "")
            elif status is not None and (line.status == "running" or status == "failed"):
                line.status = line.status_at_end() if status == "ended" else status
        if self._verbose and not self._console.is_terminal:
            self._tell(line, is_over=status in ("ended", "failed"))

    def render(self) -> Table:
        """The table as it is now; where the terminal has too few lines, running trials and the newest."""
        with self._lock:
            lines = list(self._lines.values())
            goals = self._plan.objective.goals
            size = self._console.size
            # Title, heads, lines, and what is left out take six lines.
            count = _LAST_LINES if self._ended else max(size.height - 6, 3)
            title = progress_notice(lines, samples=self._samples, began=self._began, is_over=self._ended)
            if self._plan.keeps_best:
                title += "; values of the last reports, the end tells of the best steps"
            return trial_table(
                lines,
                goals=goals,
                title=title,
                count=count,
                width=size.width,
                best_first=self._ended,
            )

    def _tell(self, line: TrialLine, *, is_over: bool) -> None:
        now = time.time()
        if is_over:
            self._print(end_notice(line, self._plan.objective.goals))
        elif now - self._printed_at >= QUIET_SECONDS:
            lines = list(self._lines.values())
            self._print(progress_notice(lines, samples=self._samples, began=self._began))

    def _print(self, text: str) -> None:
        self._printed_at = time.time()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


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
