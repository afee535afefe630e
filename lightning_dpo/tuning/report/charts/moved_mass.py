"""The chart of where the completions' probability went: to the chosen ones, or to completions in no pair."""

from __future__ import annotations

from typing import Any

from lightning_dpo.tuning.report.charts.axes import axis, layout
from lightning_dpo.tuning.report.charts.chart import Chart, Colour, trial_points
from lightning_dpo.tuning.results.result import SweepResult

__all__ = ["moved_mass"]

_CHOSEN, _REJECTED = "val/logratio/chosen", "val/logratio/rejected"


def moved_mass(result: SweepResult) -> Chart | None:
    """Each trial's log-ratios of the chosen and of the rejected completions, at its last validation."""
    shown = [t for t in result.trials if t.is_ranked and _CHOSEN in t.metrics and _REJECTED in t.metrics]
    if not shown:
        return None

    def dots(name: str, marker: dict[str, Any], wanted: list[Any]) -> dict[str, Any]:
        x, y = ([result.value(t, metric) or 0.0 for t in wanted] for metric in (_CHOSEN, _REJECTED))
        return trial_points(wanted, result, x=x, y=y, name=name, marker=marker)

    best = [trial for trial in shown if trial is result.best]
    others = [trial for trial in shown if trial is not result.best]
    star = {"color": Colour.BEST, "size": 17, "symbol": "star", "line": {"width": 1, "color": Colour.PAGE}}
    traces = [dots("trials", {"color": Colour.FINISHED, "size": 9}, others), dots("best", star, best)]
    falling = sum((result.value(trial, _CHOSEN) or 0.0) < 0 for trial in shown)
    note = (
        "log π − log π_ref of held-out completions, nats. Left of 0 the chosen ones lose probability; where "
        "the rejected ones do too, it goes to completions that are in no pair."
    )
    if falling:
        note += (
            f" So in {falling} of {len(shown)} trials: a larger β, DPOPLoss, or CombinedLoss with SFTLoss "
            "keeps it."
        )
    zero = {"zeroline": True, "zerolinecolor": Colour.FAINT}
    places = layout(axis("chosen", []) | zero, axis("rejected", []) | zero)
    return Chart("Where the probability went", note, [trace for trace in traces if trace["x"]], places)
