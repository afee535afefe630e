"""The heat map of the objective over two parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lightning_dpo.tuning.report.charts.axes import axis, is_logarithmic, layout
from lightning_dpo.tuning.report.charts.chart import Chart, capitalised, colour_scale, trial_points
from lightning_dpo.tuning.report.charts.search_space import is_numeric, varied_paths
from lightning_dpo.tuning.report.formatting import metric_label
from lightning_dpo.tuning.report.summary import parameter_labels
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["heat_map"]

_CELLS = 8
"""Cells along an axis at most."""


def heat_map(result: SweepResult) -> Chart | None:
    """The objective over two parameters: a cell is coloured by the mean of the trials in it."""
    ranked = [t for t in result.trials if t.is_ranked]
    paths = [path for path in varied_paths(ranked) if is_numeric(ranked, path)]
    if len(paths) < 2:
        return None
    across, up = paths[:2]
    metric = result.objective.primary.metric
    trials = [t for t in ranked if across in t.overrides and up in t.overrides]
    if not trials:
        return None
    x_edges, y_edges = (_edges([float(t.overrides[path]) for t in trials]) for path in (across, up))

    def dots(chosen: Sequence[TrialRecord], name: str, marker: dict[str, Any]) -> dict[str, Any]:
        x, y = ([t.overrides[path] for t in chosen] for path in (across, up))
        return trial_points(chosen, result, x=x, y=y, name=name, marker=marker)

    name = metric_label(metric)
    values = {t.id: value for t in trials if (value := result.value(t, metric)) is not None}
    heat = {
        "type": "heatmap",
        "x": x_edges,
        "y": y_edges,
        "z": _means(
            [
                (float(t.overrides[across]), float(t.overrides[up]), values[t.id])
                for t in trials
                if t.id in values
            ],
            x_edges=x_edges,
            y_edges=y_edges,
        ),
        **colour_scale(name),
        "zmin": min(values.values(), default=0),
        "zmax": max(values.values(), default=1),
        "xgap": 1,
        "ygap": 1,
        "hoverinfo": "skip",
    }
    ring = {"color": "#ffffff", "size": 13, "line": {"color": "#111111", "width": 1.5}}
    # Within its ring a trial has its own colour: it may be far better or worse than the mean of its cell.
    measured = [t for t in trials if t.id in values and t is not result.best]
    core = {"color": [values[t.id] for t in measured], "colorscale": "Viridis", "size": 8}
    core |= {"cmin": heat["zmin"], "cmax": heat["zmax"]}
    # These lie on the colour scale, which is the same in the dark.
    star = {"color": "#c2410c", "size": 18, "symbol": "star", "line": {"color": "#ffffff", "width": 1.5}}
    data = [
        heat,
        dots([t for t in trials if t is not result.best], "trials", ring),
        {**dots(measured, "", core), "showlegend": False},
    ]
    if result.best in trials:
        data.append(dots([result.best], "best", star))
    labels = parameter_labels(result)
    title = f"{capitalised(name)} over {labels[across]} and {labels[up]}"
    note = f"Each dot has the colour of its trial's {name}, each cell that of the mean of the trials in it."
    axes = (
        axis(labels[path], edges, margin=0) | {"showgrid": False}
        for path, edges in ((across, x_edges), (up, y_edges))
    )
    return Chart(title, note, data, layout(*axes))


def _means(
    points: Sequence[tuple[float, float, float]], *, x_edges: Sequence[float], y_edges: Sequence[float]
) -> list[list[float | None]]:
    """The mean of the points' values (x, y, value) in each cell, None in an empty one."""
    cells: dict[tuple[int, int], list[float]] = {}
    for x, y, value in points:
        cells.setdefault((_cell(x_edges, x), _cell(y_edges, y)), []).append(value)
    means = {place: sum(values) / len(values) for place, values in cells.items()}
    return [[means.get((c, r)) for c in range(len(x_edges) - 1)] for r in range(len(y_edges) - 1)]


def _edges(values: Sequence[float]) -> list[float]:
    """Edges of cells: around each value of a grid, else of equal width, on the axis' scale."""
    log = is_logarithmic(values)
    scaled = sorted({math.log10(value) if log else value for value in values})
    low, high = scaled[0], scaled[-1]
    if low == high:
        edges = [low - 0.5, low + 0.5]
    elif len(scaled) <= _CELLS and 2 * len(scaled) <= len(values):
        middles = [(one + other) / 2 for one, other in pairwise(scaled)]
        edges = [2 * low - middles[0], *middles, 2 * high - middles[-1]]
    else:
        count = min(_CELLS, max(3, round(math.sqrt(len(values)))))
        # The outermost trials lie a little within their cells, so that their marks are not cut.
        free = (high - low) * 0.04
        width = (high - low + 2 * free) / count
        edges = [low - free + width * number for number in range(count + 1)]
    return [10.0**edge if log else edge for edge in edges]


def _cell(edges: Sequence[float], value: float) -> int:
    """The number of the cell that a value lies in."""
    return min(sum(edge <= value for edge in edges[1:-1]), len(edges) - 2)
