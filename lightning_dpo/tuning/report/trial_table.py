"""The table of trials in the terminal: a line for each trial, which lines are shown, and how they fit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_dpo.tuning.objective import KL, Goal
from lightning_dpo.tuning.report.formatting import (
    format_duration,
    format_number,
    format_value,
    metric_label,
    one_line,
    path_labels,
)

__all__ = ["TrialLine", "end_notice", "progress_notice", "trial_table"]

_STYLES = {"finished": "green", "stopped": "dim", "running": ""}


@dataclass(slots=True)
class TrialLine:
    """A line of the table: what is known of one trial.

    Attributes:
        id: Ray's name for the trial.
        overrides: The values that it set, by config path.
        status: "running", or how it ended.
        metrics: Its last report.
        seconds_per_step: Measured since the report before.
        reported_at: When its last report came, seconds since the epoch.
        reason: In words, where something went wrong.
    """

    id: str
    overrides: Mapping[str, Any]
    status: str = "running"
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds_per_step: float = 0.0
    reported_at: float = 0.0
    reason: str = ""

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Take over a report of the trial."""
        earlier, self.metrics, self.reported_at = self.metrics, metrics, time.time()
        steps, seconds = metrics["step"], metrics.get("seconds", 0.0)
        # A process that took up a trial in the middle counts its seconds from there.
        if 0 < earlier.get("step", 0) < steps and 0 < earlier.get("seconds", 0.0) < seconds:
            steps, seconds = steps - earlier["step"], seconds - earlier["seconds"]
        self.seconds_per_step = seconds / steps if steps else 0.0

    def status_at_end(self) -> str:
        """How the trial ended if nothing went wrong: stopped early, or finished."""
        return "stopped" if self._steps_left() > 0 else "finished"

    def seconds_left(self) -> float | None:
        """Seconds until the trial's last step; None where that is not known."""
        left = self._steps_left()
        if self.status != "running" or left <= 0 or not self.seconds_per_step:
            return None
        return max(left * self.seconds_per_step - (time.time() - self.reported_at), 0.0)

    def _steps_left(self) -> int:
        return int((self.metrics.get("total_steps") or 0) - self.metrics.get("step", 0))


def trial_table(
    lines: Sequence[TrialLine],
    *,
    goals: Sequence[Goal],
    title: str,
    count: int,
    width: int,
    best_first: bool = False,
) -> Table:
    """The table of trials; where it is too wide, parameters other than beta and the rate give way.

    Args:
        lines: All trials, in the order in which they began.
        goals: What is maximised; the KL stands beside it.
        title: The line above the table.
        count: Lines to show at most.
        width: Columns of the terminal.
        best_first: Order by the first goal, and not by when they began.
    """
    paths = sorted({path: None for line in lines for path in line.overrides}, key=_importance)
    shown = _ranked(lines, goals)[:count] if best_first else _chosen(lines, goals, count)
    best = next((line for line in _ranked(lines, goals) if line.metrics), None)
    kept = len(paths)
    table = _table(shown, paths, goals, title, best)
    while kept > 2 and _width(table) > width:
        kept -= 1
        table = _table(shown, paths[:kept], goals, title, best)
    more = [(len(lines) - len(shown), "trials"), (len(paths) - kept, "parameters")]
    left_out = " and ".join(f"{number} more {name}" for number, name in more if number)
    table.caption = left_out or None
    return table


def progress_notice(lines: Sequence[TrialLine], *, samples: int, began: float, is_over: bool = False) -> str:
    """How far the sweep is, in a line."""
    running = sum(line.status == "running" for line in lines)
    done = len(lines) - running
    text = f"{done} of {max(samples, len(lines))} trials have ended"
    if is_over or not lines:
        return text
    text += f", {running} running"
    if done and done < samples:
        text += f", about {format_duration((time.time() - began) / done * (samples - done))} left"
    return text


def end_notice(line: TrialLine, goals: Sequence[Goal]) -> str:
    """A trial that has ended, in a line for a log."""
    names = path_labels(line.overrides)
    values = ", ".join(f"{names[path]} {format_value(value)}" for path, value in line.overrides.items())
    measured = [
        f"{metric_label(metric)} {format_number(line.metrics[metric], 4)}"
        for metric in _metrics(goals)
        if metric in line.metrics
    ]
    told = f": {', '.join(measured)}" if measured else ""
    why = f": {one_line(line.reason)}" if line.reason else ""
    return f"trial {line.id} {line.status} at step {line.metrics.get('step', 0)}{told} ({values}){why}"


def _table(
    lines: Sequence[TrialLine],
    paths: Sequence[str],
    goals: Sequence[Goal],
    title: str,
    best: TrialLine | None,
) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    names = path_labels(paths)
    table.add_column("trial", no_wrap=True)
    for path in paths:
        table.add_column(names[path], no_wrap=True, max_width=18)
    for name in ("steps", *map(metric_label, _metrics(goals)), "ETA"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for line in lines:
        values = [format_value(line.overrides[path]) if path in line.overrides else "" for path in paths]
        left = line.seconds_left()
        table.add_row(
            line.id[-5:],
            *map(Text, values),
            f"{line.metrics.get('step', 0)}/{line.metrics.get('total_steps') or '?'}",
            *(_measured(line.metrics.get(metric)) for metric in _metrics(goals)),
            "" if left is None else format_duration(left),
            Text(line.status, style=_STYLES.get(line.status, "red")),
            style="bold" if line is best else "",
        )
    return table


def _chosen(lines: Sequence[TrialLine], goals: Sequence[Goal], count: int) -> list[TrialLine]:
    """Running trials, the best one and the newest, in the order in which they began."""
    if len(lines) <= count:
        return list(lines)
    running = [line for line in lines if line.status == "running"]
    wanted = [*running, *_ranked(lines, goals)[:1], *reversed(lines)]
    first = {line.id for line in list({line.id: line for line in wanted}.values())[:count]}
    return [line for line in lines if line.id in first]


def _ranked(lines: Sequence[TrialLine], goals: Sequence[Goal]) -> list[TrialLine]:
    """Best first; trials without a result, and those that went wrong, last."""
    goal = goals[0]

    def key(line: TrialLine) -> tuple[bool, float]:
        value = line.metrics.get(goal.metric)
        if value is None or line.status not in ("finished", "stopped", "running"):
            return (True, 0.0)
        return (False, -goal.score(value))

    return sorted(lines, key=key)


def _importance(path: str) -> tuple[bool, bool, bool]:
    return (not path.endswith(".beta"), not path.endswith(".lr"), not path.endswith("class_path"))


def _metrics(goals: Sequence[Goal]) -> list[str]:
    return list(dict.fromkeys([*(goal.metric for goal in goals), KL]))


def _measured(value: Any) -> str:
    return format_number(value, 4, pad=True) if isinstance(value, float) else ""


def _width(table: Table) -> int:
    """Columns that the table needs, asked of a console that has room for anything."""
    return Console(width=10_000).measure(table).maximum
