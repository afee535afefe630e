"""The report's charts over the search space: the heat map of two parameters, and parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lightning_dpo.tuning.report.axes import axis, is_logarithmic, layout, ticks
from lightning_dpo.tuning.report.charts import Chart, hover_text
from lightning_dpo.tuning.report.labels import metric_name, number, path_names, value_text
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["heat_map", "parallel"]

_CELLS = 8
_LABEL = 16
"""Characters of a label that fit above an axis."""


def heat_map(result: SweepResult) -> Chart | None:
    """The objective over two parameters: a cell is coloured by the mean of the trials in it."""
    names = path_names(path for t in result.trials for path in t.overrides)
    ranked = [t for t in result.trials if t.is_ranked]
    found = [path for path in _varied(ranked) if _is_numeric(ranked, path)]
    if len(found) < 2:
        return None
    across, up = found[:2]
    metric = result.objective.primary.metric
    trials = [t for t in ranked if across in t.overrides and up in t.overrides]
    if not trials:
        return None
    xs, ys = ([float(t.overrides[path]) for t in trials] for path in (across, up))
    columns, rows = _edges(xs), _edges(ys)
    cells: dict[tuple[int, int], list[float]] = {}
    for trial, x, y in zip(trials, xs, ys, strict=True):
        cells.setdefault((_cell(columns, x), _cell(rows, y)), []).append(float(trial.metrics[metric]))
    means = {place: sum(values) / len(values) for place, values in cells.items()}
    table = [[means.get((c, r)) for c in range(len(columns) - 1)] for r in range(len(rows) - 1)]

    def dots(chosen: Sequence[TrialRecord], name: str, marker: dict[str, Any]) -> dict[str, Any]:
        return {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": [t.overrides[across] for t in chosen],
            "y": [t.overrides[up] for t in chosen],
            "text": [hover_text(t, result) for t in chosen],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": marker,
        }

    heat = {
        "type": "heatmap",
        "x": columns,
        "y": rows,
        "z": table,
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": metric_name(metric), "side": "right"}, "thickness": 12, "nticks": 6},
        "xgap": 1,
        "ygap": 1,
        "hoverinfo": "skip",
    }
    rest = [t for t in trials if t is not result.best]
    ring = {"color": "#ffffff", "size": 8, "line": {"color": "#111111", "width": 1.5}}
    # These lie on the colour scale, which is the same in the dark.
    star = {"color": "#c2410c", "size": 18, "symbol": "star", "line": {"color": "#ffffff", "width": 1.5}}
    data = [heat, dots(rest, "trials", ring)]
    if result.best in trials:
        data.append(dots([result.best], "best", star))
    name = metric_name(metric)
    title = f"{name[:1].upper()}{name[1:]} over {names[across]} and {names[up]}"
    note = f"Each dot is a trial, each cell the mean {name} of the trials in it."
    grids = axis(names[across], columns, margin=0) | {"showgrid": False}
    heights = axis(names[up], rows, margin=0) | {"showgrid": False}
    return Chart(title, note, data, layout(grids, heights))


def parallel(result: SweepResult) -> Chart | None:
    """Every trial as a line through its values, its metrics and its steps."""
    goals = result.frontier_goals
    trials = [t for t in result.trials if t.is_ranked and all(g.metric in t.metrics for g in goals)]
    names = path_names(path for t in result.trials for path in t.overrides)
    paths = _varied(trials)
    if not paths or len(trials) < 2:
        return None
    dimensions = [_dimension(names[path], [t.overrides.get(path) for t in trials]) for path in paths]
    dimensions += [_dimension(metric_name(g.metric), [t.metrics[g.metric] for t in trials]) for g in goals]
    dimensions.append(_dimension("steps", [t.step for t in trials]))
    colours = [t.metrics[goals[0].metric] for t in trials]
    line = {
        "color": colours,
        "colorscale": "Viridis",
        "showscale": True,
        "colorbar": {
            "title": {"text": metric_name(goals[0].metric), "side": "right"},
            "thickness": 12,
            "nticks": 6,
        },
    }
    data = [{"type": "parcoords", "line": line, "dimensions": dimensions, "labelside": "top"}]
    note = "One line for each trial. Drag along an axis to keep only the trials that pass there."
    width = 125 * len(dimensions) + 60
    margins = {"margin": {"l": 64, "r": 24, "t": 56, "b": 28}}
    return Chart("Parallel coordinates", note, data, margins, min_width=width)


def _dimension(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """One axis; texts, and values that a trial lacks, have places of their own at its lower end."""
    known = [value for value in values if value is not None]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in known):
        texts = [value_text(value) if value is not None else "–" for value in values]
        # Equal texts share a place; the one for "not set" is the lowest.
        places = sorted(set(texts), key=lambda text: (text != "–", text))
        marks: list[float] = list(range(len(places)))
        return _finish(name, [float(places.index(text)) for text in texts], marks, places)
    floats = [float(value) for value in known]
    low, high = min(floats), max(floats)
    if is_logarithmic(floats):
        places_log = ticks(low, high) or [low, high]
        shown = [math.log10(value) if value is not None else None for value in values]
        marks = [math.log10(place) for place in places_log]
        labels = [number(place, 1) for place in places_log]
        low, high = math.log10(low), math.log10(high)
    else:
        shown = [float(value) if value is not None else None for value in values]
        distinct = sorted(set(floats))
        marks = distinct if len(distinct) <= 6 else _round_marks(low, high)
        labels = [number(mark) for mark in marks]
    lowest = low - 0.15 * ((high - low) or 1.0)
    if len(known) < len(values):
        marks, labels = [lowest, *marks], ["–", *labels]
    return _finish(name, [lowest if value is None else value for value in shown], marks, labels)


def _finish(
    name: str, values: Sequence[float], marks: Sequence[float], labels: Sequence[str]
) -> dict[str, Any]:
    ends = [min([*values, *marks]), max([*values, *marks])]
    if ends[0] == ends[1]:
        ends = [ends[0] - 0.5, ends[1] + 0.5]
    # An axis is drawn from its first to its last tick.
    ticked = dict(sorted({**dict.fromkeys(ends, ""), **dict(zip(marks, labels, strict=True))}.items()))
    return {
        "label": name if len(name) <= _LABEL else f"{name[: _LABEL - 1]}…",
        "values": list(values),
        "tickvals": list(ticked),
        "ticktext": list(ticked.values()),
        "range": ends,
    }


def _round_marks(low: float, high: float) -> list[float]:
    """About five round values within a range."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= raw)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _varied(trials: Sequence[TrialRecord]) -> list[str]:
    """Paths that differ between trials: beta and the learning rate first, then numbers, then choices."""
    values: dict[str, set[str]] = {}
    for trial in trials:
        for path in trial.overrides:
            values.setdefault(path, set()).add(value_text(trial.overrides[path]))
    varied = [
        path
        for path, found in values.items()
        if len(found) > 1 or any(path not in trial.overrides for trial in trials)
    ]
    return sorted(
        varied,
        key=lambda path: (
            not path.endswith(".beta"),
            not path.endswith(".lr"),
            not _is_numeric(trials, path),
        ),
    )


def _is_numeric(trials: Sequence[TrialRecord], path: str) -> bool:
    found = [t.overrides[path] for t in trials if path in t.overrides]
    return len({str(v) for v in found}) > 1 and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in found
    )


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
    return min(sum(edge <= value for edge in edges[1:-1]), len(edges) - 2)
