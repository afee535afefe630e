"""The chart of paired differences: which trials can be told from the best one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_dpo.tuning.report.charts.axes import axis, layout
from lightning_dpo.tuning.report.charts.chart import Chart, Colour, hover_lines, hover_text, trial_points
from lightning_dpo.tuning.report.formatting import format_number, metric_label
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["differences"]

_MOST = 24
"""Trials that are shown; the table has all of them."""


def differences(result: SweepResult) -> Chart | None:
    """Each trial's paired difference from the best one, with its interval; the best trials of many."""
    compared = result.comparisons
    shown = [trial for trial in result.trials if trial.id in compared][:_MOST]
    if len(shown) < 2:
        return None
    best, recommended = shown[0], result.recommended
    numbers = {trial.id: str(place) for place, trial in enumerate(result.trials, start=1)}

    def points(
        trials: Sequence[TrialRecord], name: str, colour: str, symbol: str, size: int
    ) -> dict[str, Any]:
        found = [compared[trial.id] for trial in trials]
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [one.difference_interval.high - one.difference for one in found],
            "arrayminus": [one.difference - one.difference_interval.low for one in found],
            "color": colour,
            "thickness": 1.5,
            "width": 3,
        }
        trace = trial_points(
            trials,
            result,
            x=[one.difference for one in found],
            y=[0.0 for _ in found],
            name=name,
            error_x=bars,
            marker={"color": colour, "symbol": symbol, "size": size},
        )
        trace["y"] = [numbers[trial.id] for trial in trials]
        trace["text"] = [
            hover_lines(
                hover_text(trial, result),
                f"difference {one.difference:+.4f}, {one.difference_interval.low:+.4f} to "
                f"{one.difference_interval.high:+.4f}",
                f"p = {format_number(one.p_value, 2)}",
            )
            for trial, one in zip(trials, found, strict=True)
        ]
        return trace

    others = [trial for trial in shown[1:] if trial is not recommended]
    level = [trial for trial in others if compared[trial.id].is_level]
    told = [trial for trial in others if trial not in level]
    traces = (
        points([best], "best", Colour.BEST, "star", 15),
        points(
            [recommended] if recommended in shown[1:] else [], "recommended", Colour.RECOMMENDED, "square", 11
        ),
        points(level, "cannot be told from the best", Colour.FINISHED, "circle", 9),
        points(told, "can be told from it", Colour.STOPPED, "circle-open", 9),
    )
    label = metric_label(result.objective.primary.metric)
    same = result.objective.shared(compared[best.id].pairs)
    note = (
        f"{label.capitalize()} less the best one's on {same}, with {result.confidence:.0%} "
        "intervals. A trial can be told from the best one if p is below "
        f"{format_number(1 - result.confidence, 2)}; of trials that are as good, this share looks worse by "
        "chance."
    )
    if result.reruns:
        note += " The intervals hold the variance between seeds, pooled over all trials that were run again."
    left_out = len(compared) - len(shown)
    if left_out:
        note += f" {left_out} more trial{'s are' if left_out > 1 else ' is'} in the table."
    up = {
        **axis("rank", []),
        "type": "category",
        "categoryorder": "array",
        "categoryarray": [numbers[trial.id] for trial in reversed(shown)],
    }
    across = {**axis(f"difference in {label}", []), "zeroline": True}
    return Chart(
        "Which trials can be told from the best one",
        note,
        [trace for trace in traces if trace["x"]],
        layout(across, up),
    )
