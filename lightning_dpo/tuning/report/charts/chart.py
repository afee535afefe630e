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
    "recommended_points",
    "trial_points",
]


class Colour(StrEnum):
    """Colours by their names in the page's style sheet, so that charts follow light and dark."""

    BEST = "var(--best)"
    RECOMMENDED = "var(--recommended)"
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
        found = result.mean(trial, metric)
        if found is not None:
            error = trial.metrics.get(f"{metric}_error") if found.runs == 1 else found.error
            spread = f" ± {format_number(error, 2)}" if error is not None else ""
            over = f" (mean of {found.runs} seeds)" if found.runs > 1 else ""
            lines.append(f"{metric_label(metric)} {format_number(found.mean)}{spread}{over}")
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


def recommended_points(
    result: SweepResult, shown: Sequence[TrialRecord], *, x: Sequence[float], y: Sequence[float]
) -> dict[str, Any]:
    """A ring around the recommended trial; without points where that is the best one, or is not shown.

    Args:
        result: A sweep that has ended.
        shown: The trials of a chart.
        x: Places across, one for each of them.
        y: Places up, one for each of them.
    """
    trial = result.recommended
    found = [place for place, one in enumerate(shown) if one is trial and one is not result.best]
    found = found if len(result.comparisons) > 1 else []
    ring = {"color": Colour.RECOMMENDED, "size": 18, "symbol": "circle-open", "line": {"width": 3}}
    places = {"x": [x[place] for place in found], "y": [y[place] for place in found]}
    return trial_points([shown[place] for place in found], result, **places, name="recommended", marker=ring)


def colour_scale(title: str) -> dict[str, Any]:
    """Plotly's options for values shown by colour, with their scale beside the chart."""
    bar = {"title": {"text": title, "side": "right"}, "thickness": 12, "nticks": 6}
    return {"colorscale": "Viridis", "colorbar": bar}


def capitalised(text: str) -> str:
    """A text with its first letter in upper case and all others as they are."""
    return text[:1].upper() + text[1:]
