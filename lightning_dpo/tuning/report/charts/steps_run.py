"""The chart of the steps that each trial ran, and of those that stopping saved."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import Any

from lightning_dpo.tuning.report.charts.axes import axis, layout
from lightning_dpo.tuning.report.charts.chart import HOVER, Chart, Colour, hover_lines, hover_text
from lightning_dpo.tuning.results.result import SweepResult

__all__ = ["steps_run"]


def steps_run(result: SweepResult) -> Chart:
    """How far each trial came, best first, and what stopping it saved."""
    trials = result.trials
    ids = [t.id for t in trials]
    # Of a long reason the first lines are shown; the page tells all of it.
    texts = [hover_lines(hover_text(t, result), *textwrap.wrap(t.reason, 44)[:4]) for t in trials]
    common = {"type": "bar", "hovertemplate": HOVER, "textposition": "none"}

    def bars(name: str, colour: str, shape: str, places: list[int]) -> dict[str, Any]:
        return common | {
            "name": name,
            "x": [ids[place] for place in places],
            "y": [trials[place].step for place in places],
            "text": [texts[place] for place in places],
            "marker": {"color": colour, "pattern": {"shape": shape, "size": 5}},
        }

    traces = (
        bars("finished", Colour.FINISHED, "", [n for n, t in enumerate(trials) if t.status == "finished"]),
        bars("stopped early", Colour.STOPPED, "", [n for n, t in enumerate(trials) if t.status == "stopped"]),
        bars("went wrong", Colour.WRONG, "x", [n for n, t in enumerate(trials) if not t.is_ranked]),
    )
    data = [trace for trace in traces if trace["x"]]
    left = [max(t.total_steps - t.step, 0) if t.status != "finished" else 0 for t in trials]
    if any(left):
        faint = {"color": Colour.FAINT}
        data.append(common | {"name": "not run", "x": ids, "y": left, "text": texts, "marker": faint})
    across = {
        **axis("trials, best first", []),
        "type": "category",
        "categoryorder": "array",
        "categoryarray": ids,
        "showticklabels": False,
        "showgrid": False,
    }
    note = "One bar for each trial, in the order of the ranking."
    stops = Counter(t.step for t in trials if t.status == "stopped")
    if stops:
        told = ", ".join(f"{count} at step {step:,}" for step, count in sorted(stops.items()))
        note += f" Stopped early: {told}."
    places = layout(across, axis("steps", []), barmode="stack", bargap=0.25)
    return Chart("Steps run and saved", note, data, places)
