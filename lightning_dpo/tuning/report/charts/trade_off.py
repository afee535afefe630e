"""The chart of two goals against each other, such as accuracy against KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_dpo.tuning.report.charts.axes import axis, layout
from lightning_dpo.tuning.report.charts.chart import (
    Chart,
    Colour,
    capitalised,
    recommended_points,
    trial_points,
)
from lightning_dpo.tuning.report.formatting import metric_label
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["trade_off"]


def trade_off(result: SweepResult) -> Chart | None:
    """The first two goals of the frontier against each other, the Pareto set joined and marked."""
    if len(result.frontier_goals) < 2:
        return None
    up, across = result.frontier_goals[:2]
    shown = [
        t
        for t in result.trials
        if t.is_ranked and all(result.value(t, goal.metric) is not None for goal in (up, across))
    ]
    if not shown:
        return None

    def values(trial: TrialRecord) -> tuple[float, float]:
        x, y = (result.value(trial, goal.metric) for goal in (across, up))
        assert x is not None
        assert y is not None
        return x, y

    # The frontier's trials have all of its goals, so they are shown.
    pareto = sorted(result.frontier, key=lambda t: values(t)[0])
    on_front = {trial.id for trial in pareto}

    def points(trials: Sequence[TrialRecord], **style: Any) -> dict[str, Any]:
        x, y = ([values(t)[place] for t in trials] for place in (0, 1))
        return trial_points(trials, result, x=x, y=y, **style)

    def dots(status: str, colour: str, symbol: str) -> dict[str, Any]:
        trials = [t for t in shown if t.id not in on_front and t.status == status]
        marker = {"color": colour, "size": 9, "symbol": symbol, "line": {"width": 1.5, "color": colour}}
        return points(trials, name=status, marker=marker)

    # Between two trials nothing better than the left one is known.
    line = {"color": Colour.PARETO, "width": 2, "shape": "hv" if across.mode == "min" else "vh"}
    diamond = {"color": Colour.PARETO, "size": 12, "symbol": "diamond"}
    star = {"color": Colour.BEST, "size": 17, "symbol": "star", "line": {"width": 1, "color": Colour.PAGE}}
    traces = (
        dots("stopped", Colour.STOPPED, "circle-open"),
        dots("finished", Colour.FINISHED, "circle"),
        points(pareto, mode="lines+markers", name="Pareto set", marker=diamond, line=line),
        points([trial for trial in shown if trial is result.best], name="best", marker=star),
        recommended_points(result, shown, x=[values(t)[0] for t in shown], y=[values(t)[1] for t in shown]),
    )
    labels = metric_label(up.metric), metric_label(across.metric)
    better = f"{'up' if up.mode == 'max' else 'down'} and {'left' if across.mode == 'min' else 'right'}"
    note = (
        f"Better is {better}. The line joins the Pareto set: trials that no other one beats in both at once."
    )
    if result.reruns:
        note += " Of trials that were run again it shows the means."
    left_out = len(result.trials) - len(shown)
    if left_out:
        note += f" {left_out} that went wrong {'is' if left_out == 1 else 'are'} not shown."
    places = layout(axis(labels[1], [values(t)[0] for t in shown]), axis(labels[0], []))
    title = f"{capitalised(labels[0])} against {labels[1]}"
    return Chart(title, note, [trace for trace in traces if trace["x"]], places)
