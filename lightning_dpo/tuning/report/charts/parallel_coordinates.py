"""The chart of every trial as a line through its values, its metrics and its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lightning_dpo.tuning.report.charts.axes import is_logarithmic, ticks
from lightning_dpo.tuning.report.charts.chart import Chart, Colour, colour_scale
from lightning_dpo.tuning.report.charts.search_space import varied_paths
from lightning_dpo.tuning.report.formatting import format_number, format_value, metric_label
from lightning_dpo.tuning.report.summary import parameter_labels
from lightning_dpo.tuning.results.result import SweepResult

__all__ = ["parallel_coordinates"]

_LABEL = 16
"""Characters of a label that fit above an axis."""


def parallel_coordinates(result: SweepResult) -> Chart | None:
    """Every trial as a line through its values, its metrics and its steps."""
    goals = result.frontier_goals
    trials = [
        t for t in result.trials if t.is_ranked and all(result.value(t, g.metric) is not None for g in goals)
    ]
    labels = parameter_labels(result)
    paths = varied_paths(trials)
    if not paths or len(trials) < 2:
        return None
    dimensions = [_dimension(labels[path], [t.overrides.get(path) for t in trials]) for path in paths]
    dimensions += [
        _dimension(metric_label(g.metric), [result.value(t, g.metric) for t in trials]) for g in goals
    ]
    dimensions.append(_dimension("steps", [t.step for t in trials]))
    colours = [result.value(t, goals[0].metric) for t in trials]
    line = {"color": colours, "showscale": True, **colour_scale(metric_label(goals[0].metric))}
    # Thin lines need colours that stand out on the page, light or dark, at both ends of the scale.
    ends = [Colour.FINISHED, Colour.BEST] if goals[0].mode == "max" else [Colour.BEST, Colour.FINISHED]
    line["colorscale"] = list(enumerate(ends))
    data = [{"type": "parcoords", "line": line, "dimensions": dimensions, "labelside": "top"}]
    note = "One line for each trial. Drag along an axis to keep only the trials that pass there."
    width = 125 * len(dimensions) + 60
    margins = {"margin": {"l": 64, "r": 24, "t": 56, "b": 28}}
    return Chart("Parallel coordinates", note, data, margins, min_width=width)


def _dimension(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """One axis; texts have places of their own, and so has what a trial lacks, at the lower end."""
    known = [value for value in values if value is not None]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in known):
        texts = [format_value(value) if value is not None else "–" for value in values]
        # Equal texts share a place; the one for "not set" is the lowest.
        places = sorted(set(texts), key=lambda text: (text != "–", text))
        marks: list[float] = list(range(len(places)))
        return _axis(name, [float(places.index(text)) for text in texts], marks, places)
    floats = [float(value) for value in known]
    low, high = min(floats), max(floats)
    if is_logarithmic(floats):
        places_log = ticks(low, high) or [low, high]
        shown = [math.log10(value) if value is not None else None for value in values]
        marks = [math.log10(place) for place in places_log]
        labels = [format_number(place, 1) for place in places_log]
        low, high = math.log10(low), math.log10(high)
    else:
        shown = [float(value) if value is not None else None for value in values]
        distinct = sorted(set(floats))
        # Labels of values that lie close together would cover each other.
        is_spread = all(after - value > 0.06 * (high - low) for value, after in pairwise(distinct))
        marks = distinct if len(distinct) <= 6 and is_spread else _round_marks(low, high)
        labels = [format_number(mark) for mark in marks]
    lowest = low - 0.15 * ((high - low) or 1.0)
    if len(known) < len(values):
        marks, labels = [lowest, *marks], ["–", *labels]
    return _axis(name, [lowest if value is None else value for value in shown], marks, labels)


def _axis(
    name: str, values: Sequence[float], marks: Sequence[float], labels: Sequence[str]
) -> dict[str, Any]:
    """An axis in plotly's words, with labels at its marks."""
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
    return [count * step for count in range(first, math.floor(high / step) + 1)]
