"""What the charts of a report share: their form, the page's colours, and what pointing at a trial shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from markupsafe import Markup

from lightning_dpo.tuning.report.formatting import format_number, format_value, metric_label
from lightning_dpo.tuning.report.summary import parameter_labels, shown_metrics
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = [
    "HOVER",
    "Chart",
    "Colour",
    "capitalised",
    "colour_scale",
    "hover_lines",
    "hover_text",
    "trial_points",
]


class Colour(StrEnum):
    """Colours by their names in the page's style sheet, so that charts follow light and dark."""

    BEST = "var(--best)"
    PARETO = "var(--pareto)"
    FINISHED = "var(--finished)"
    STOPPED = "var(--stopped)"
    WRONG = "var(--wrong)"
    FAINT = "var(--faint)"
    PAGE = "var(--page)"


HOVER = "%{text}<extra></extra>"
"""Plotly's template that shows a point's text and nothing else."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of a report.

    Attributes:
        title: The chart's heading.
        note: How to read it, a sentence or two.
        data: Plotly's traces.
        layout: Plotly's layout.
        min_width: Pixels below which the chart scrolls sideways within its frame.
    """

    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    min_width: int = 0


def hover_lines(*lines: str) -> Markup:
    """Lines of a hover text, which plotly reads as HTML: all that is not `Markup` is escaped."""
    return Markup("<br>").join(lines)


def hover_text(trial: TrialRecord, result: SweepResult) -> Markup:
    """All that is known of a trial, in lines."""
    labels = parameter_labels(result)
    lines: list[str] = [Markup("<b>trial {}</b>").format(trial.id)]
    lines += [f"{labels[path]} = {format_value(value)}" for path, value in trial.overrides.items()]
    for metric in shown_metrics(result):
        if metric in trial.metrics:
            error = trial.metrics.get(f"{metric}_error")
            spread = f" ± {format_number(error, 2)}" if error is not None else ""
            lines.append(f"{metric_label(metric)} {format_number(trial.metrics[metric])}{spread}")
    lines.append(f"step {trial.step} of {trial.total_steps or '?'}, {trial.status}")
    if trial.kept is not None:
        lines.append(f"kept: step {trial.kept.step}")
    return hover_lines(*lines)


def trial_points(
    trials: Sequence[TrialRecord],
    result: SweepResult,
    *,
    x: Sequence[float],
    y: Sequence[float],
    **style: Any,
) -> dict[str, Any]:
    """A trace with one point for each trial, which shows all of the trial when one points at it.

    Args:
        trials: One for each point.
        result: The sweep they belong to.
        x: Places across, one for each trial.
        y: Places up, one for each trial.
        style: More of plotly's options for a scatter trace.
    """
    text = [hover_text(trial, result) for trial in trials]
    common = {"type": "scatter", "mode": "markers", "text": text, "hovertemplate": HOVER}
    return common | {"x": list(x), "y": list(y)} | style


def colour_scale(title: str) -> dict[str, Any]:
    """Plotly's options for values shown by colour, with their scale beside the chart."""
    bar = {"title": {"text": title, "side": "right"}, "thickness": 12, "nticks": 6}
    return {"colorscale": "Viridis", "colorbar": bar}


def capitalised(text: str) -> str:
    """A text with its first letter in upper case and all others as they are."""
    return text[:1].upper() + text[1:]
