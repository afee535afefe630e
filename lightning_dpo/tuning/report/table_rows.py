"""Rows of the table of trials: which ones are shown, and how they fit the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_dpo.tuning.objective import Goal
from lightning_dpo.tuning.report.labels import duration, metric_name, number, path_names, value_text
from lightning_dpo.tuning.results.result import KL

__all__ = ["Row", "plain_line", "progress", "table_of"]

_STYLES = {"finished": "green", "stopped": "dim", "running": ""}


@dataclass(slots=True)
class Row:
    """What the table knows of a trial."""

    id: str
    overrides: Mapping[str, Any]
    status: str = "running"
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds_per_step: float = 0.0
    heard_at: float = 0.0

    def heard(self, metrics: Mapping[str, Any]) -> None:
        """Take over a report."""
        earlier, self.metrics, self.heard_at = self.metrics, metrics, time.time()
        steps, seconds = metrics["step"], metrics.get("seconds", 0.0)
        # A process that took up a trial in the middle counts its seconds from there.
        if 0 < earlier.get("step", 0) < steps and 0 < earlier.get("seconds", 0.0) < seconds:
            steps, seconds = steps - earlier["step"], seconds - earlier["seconds"]
        self.seconds_per_step = seconds / steps if steps else 0.0

    def ended(self) -> str:
        """How it ended if nothing went wrong."""
        return (
            "stopped" if self.metrics.get("step", 0) < (self.metrics.get("total_steps") or 0) else "finished"
        )

    def seconds_left(self) -> float | None:
        """Until its last step; None where that is not known."""
        left = (self.metrics.get("total_steps") or 0) - self.metrics.get("step", 0)
        if self.status != "running" or left <= 0 or not self.seconds_per_step:
            return None
        return max(float(left * self.seconds_per_step) - (time.time() - self.heard_at), 0.0)


def table_of(
    rows: Sequence[Row],
    *,
    goals: Sequence[Goal],
    title: str,
    count: int,
    width: int,
    best_first: bool = False,
) -> Table:
    """The table; parameters other than beta and the learning rate give way where it would be too wide.

    Args:
        rows: All trials, in the order in which they began.
        goals: What is maximised; the KL stands beside it.
        title: The line above.
        count: Rows to show at most.
        width: Columns of the terminal.
        best_first: Order by the first goal, and not by when they began.
    """
    paths = sorted({path: None for row in rows for path in row.overrides}, key=_importance)
    shown = _ranked(rows, goals)[:count] if best_first else _chosen(rows, goals, count)
    best = next((row for row in _ranked(rows, goals) if row.metrics), None)
    kept = len(paths)
    table = _table(shown, paths, goals, title, best)
    while kept > 2 and _width(table) > width:
        kept -= 1
        table = _table(shown, paths[:kept], goals, title, best)
    more = [(len(rows) - len(shown), "trials"), (len(paths) - kept, "parameters")]
    left_out = " and ".join(f"{number} more {name}" for number, name in more if number)
    table.caption = left_out or None
    return table


def progress(rows: Sequence[Row], *, samples: int, began: float, is_over: bool = False) -> str:
    """How far the sweep is, in a line."""
    running = sum(row.status == "running" for row in rows)
    done = len(rows) - running
    text = f"{done} of {max(samples, len(rows))} trials have ended"
    if is_over or not rows:
        return text
    text += f", {running} running"
    if done and done < samples:
        text += f", about {duration((time.time() - began) / done * (samples - done))} left"
    return text


def plain_line(row: Row, goals: Sequence[Goal]) -> str:
    """A trial that has ended, in a line for a log."""
    names = path_names(row.overrides)
    values = ", ".join(f"{names[path]} {value_text(value)}" for path, value in row.overrides.items())
    measured = [
        f"{metric_name(metric)} {number(row.metrics[metric], 4)}"
        for metric in _metrics(goals)
        if metric in row.metrics
    ]
    told = f": {', '.join(measured)}" if measured else ""
    return f"trial {row.id} {row.status} at step {row.metrics.get('step', 0)}{told} ({values})"


def _table(
    rows: Sequence[Row], paths: Sequence[str], goals: Sequence[Goal], title: str, best: Row | None
) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    names = path_names(paths)
    table.add_column("trial", no_wrap=True)
    for path in paths:
        table.add_column(names[path], no_wrap=True, max_width=18)
    for name in ("steps", *map(metric_name, _metrics(goals)), "ETA"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for row in rows:
        values = [value_text(row.overrides[path]) if path in row.overrides else "" for path in paths]
        left = row.seconds_left()
        table.add_row(
            row.id[-5:],
            *map(Text, values),
            f"{row.metrics.get('step', 0)}/{row.metrics.get('total_steps') or '?'}",
            *(_measured(row.metrics.get(metric)) for metric in _metrics(goals)),
            "" if left is None else duration(left),
            Text(row.status, style=_STYLES.get(row.status, "red")),
            style="bold" if row is best else "",
        )
    return table


def _chosen(rows: Sequence[Row], goals: Sequence[Goal], count: int) -> list[Row]:
    """Running trials, the best one and the newest, in the order in which they began."""
    if len(rows) <= count:
        return list(rows)
    running = [row for row in rows if row.status == "running"]
    wanted = [*running, *_ranked(rows, goals)[:1], *reversed(rows)]
    first = {row.id for row in list({row.id: row for row in wanted}.values())[:count]}
    return [row for row in rows if row.id in first]


def _ranked(rows: Sequence[Row], goals: Sequence[Goal]) -> list[Row]:
    """Best first; trials without a result, and those that went wrong, last."""
    goal = goals[0]

    def key(row: Row) -> tuple[bool, float]:
        value = row.metrics.get(goal.metric)
        if value is None or row.status not in ("finished", "stopped", "running"):
            return (True, 0.0)
        return (False, -goal.score(value))

    return sorted(rows, key=key)


def _importance(path: str) -> tuple[bool, bool, bool]:
    return (not path.endswith(".beta"), not path.endswith(".lr"), not path.endswith("class_path"))


def _metrics(goals: Sequence[Goal]) -> list[str]:
    return list(dict.fromkeys([*(goal.metric for goal in goals), KL]))


def _measured(value: Any) -> str:
    return number(value, 4, pad=True) if isinstance(value, float) else ""


def _width(table: Table) -> int:
    """Columns that the table needs, asked of a console that has room for anything."""
    return Console(width=10_000).measure(table).maximum
