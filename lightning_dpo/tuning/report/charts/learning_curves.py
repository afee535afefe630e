"""The chart of the objective over steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_dpo.tuning.report.charts.axes import axis, layout
from lightning_dpo.tuning.report.charts.chart import HOVER, Chart, Colour, hover_lines, hover_text
from lightning_dpo.tuning.report.formatting import format_number, metric_label
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["learning_curves"]


def learning_curves(result: SweepResult) -> Chart:
    """The objective over steps, one curve for each trial."""
    best = [t for t in result.trials[:1] if t.is_ranked]
    rest = [t for t in result.trials if t not in best]
    stopped = [t for t in rest if t.is_ranked and t.status == "stopped"]
    finished = [t for t in rest if t.is_ranked and t.status == "finished"]
    wrong = [t for t in rest if not t.is_ranked]
    traces = (
        _curves(stopped, result, name="stopped early", colour=Colour.STOPPED, symbol="circle-open"),
        _curves(finished, result, name="finished", colour=Colour.FINISHED, symbol="circle"),
        _curves(wrong, result, name="went wrong", colour=Colour.WRONG, symbol="x"),
        _curves(best, result, name="best", colour=Colour.BEST, symbol="star", width=3, opacity=1, size=13),
    )
    label = metric_label(result.objective.primary.metric)
    note = f"Validation {label} at each report; a curve that ends early was stopped or went wrong there."
    if result.reruns:
        note += " Runs with other seeds are not shown."
    data = [trace for trace in traces if any(x is not None for x in trace["x"])]
    return Chart("Learning curves", note, data, layout(axis("step", []), axis(label, [])))


def _curves(
    trials: Sequence[TrialRecord],
    result: SweepResult,
    *,
    name: str,
    colour: str,
    symbol: str,
    width: float = 1.5,
    opacity: float = 0.75,
    size: int = 9,
) -> dict[str, Any]:
    """The curves of trials that ended in the same way: one trace, with a gap after each trial."""
    metric = result.objective.primary.metric
    xs: list[Any] = []
    ys: list[Any] = []
    texts: list[str] = []
    sizes: list[int] = []
    for trial in trials:
        history = [entry for entry in trial.history if metric in entry]
        text = hover_text(trial, result)
        xs += [*(entry["step"] for entry in history), None]
        ys += [*(entry[metric] for entry in history), None]
        for entry in history:
            value = f"{metric_label(metric)} {format_number(entry[metric])}"
            texts.append(hover_lines(text, "", f"at step {entry['step']}: {value}"))
        texts.append("")
        # A larger mark where the curve ends.
        sizes += [*([4] * (len(history) - 1)), *([size] * bool(history)), 0]
    line = {"width": 1.5, "color": colour}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": xs,
        "y": ys,
        "text": texts,
        "connectgaps": False,
        "opacity": opacity,
        "line": {"width": width, "color": colour},
        "marker": {"size": sizes, "symbol": symbol, "color": colour, "opacity": 1, "line": line},
        "hovertemplate": HOVER,
    }
