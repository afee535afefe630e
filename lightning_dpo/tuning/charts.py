"""The charts of a report, as plotly figures in plain JSON values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_dpo.tuning.records import TrialRecord
from lightning_dpo.tuning.results import SweepResult

__all__ = ["charts"]

_ACCENT, _PLAIN, _BAD = "#c2410c", "#1d4ed8", "#9ca3af"


def charts(result: SweepResult) -> dict[str, dict[str, Any]]:
    """All charts that the sweep has data for, by title."""
    found: dict[str, dict[str, Any]] = {}
    goals = result.frontier_goals
    if len(goals) > 1:
        found[f"{_last(goals[0].metric)} against {_last(goals[1].metric)}"] = _trade_off(result)
    numeric = _numeric_paths(result.trials)
    if len(numeric) > 1:
        found[f"{_last(result.objective.primary.metric)} over {numeric[0]} and {numeric[1]}"] = _heat_map(
            result, numeric[0], numeric[1]
        )
    found["Learning curves"] = _curves(result)
    if numeric:
        found["Parallel coordinates"] = _parallel(result, numeric)
    found["Steps of each trial"] = _steps(result)
    return found


def _trade_off(result: SweepResult) -> dict[str, Any]:
    """The first two goals of the frontier against each other, the Pareto set joined and marked."""
    up, across = result.frontier_goals[:2]
    shown = [
        t for t in result.trials if t.is_ranked and up.metric in t.metrics and across.metric in t.metrics
    ]
    pareto = sorted(
        (t for t in result.frontier if t in shown), key=lambda trial: trial.metrics[across.metric]
    )

    def points(trials: Sequence[TrialRecord], **style: Any) -> dict[str, Any]:
        return {
            "type": "scatter",
            "x": [t.metrics[across.metric] for t in trials],
            "y": [t.metrics[up.metric] for t in trials],
            "text": [_hover(t) for t in trials],
            "hovertemplate": "%{text}<br>"
            + f"{across.metric} %{{x:.4f}}<br>{up.metric} %{{y:.4f}}<extra></extra>",
            **style,
        }

    others = [t for t in shown if t not in pareto]
    return {
        "data": [
            points(others, mode="markers", name="other trials", marker={"color": _PLAIN, "size": 9}),
            points(
                pareto,
                mode="lines+markers",
                name="Pareto set",
                marker={"color": _ACCENT, "size": 12, "symbol": "diamond"},
                line={"color": _ACCENT, "dash": "dot", "shape": "hv"},
            ),
        ],
        "layout": _axes(across.metric, up.metric),
    }


def _heat_map(result: SweepResult, across: str, up: str) -> dict[str, Any]:
    """The objective over two parameters: a coloured cell around each trial's place."""
    metric = result.objective.primary.metric
    trials = [t for t in result.trials if t.is_ranked and across in t.overrides and up in t.overrides]
    columns, rows = (_bins([float(t.overrides[path]) for t in trials]) for path in (across, up))
    cells: dict[tuple[int, int], list[float]] = {}
    for trial in trials:
        place = _bin(columns, float(trial.overrides[across])), _bin(rows, float(trial.overrides[up]))
        cells.setdefault(place, []).append(float(trial.metrics[metric]))
    means = {place: sum(values) / len(values) for place, values in cells.items()}
    table = [[means.get((c, r)) for c in range(len(columns) - 1)] for r in range(len(rows) - 1)]
    values = {
        "x": [t.overrides[across] for t in trials],
        "y": [t.overrides[up] for t in trials],
        "text": [_hover(t) for t in trials],
    }
    layout = _axes(across, up)
    for axis, edges in (("xaxis", columns), ("yaxis", rows)):
        if edges[0] > 0 and edges[-1] / edges[0] > 10:
            layout[axis]["type"] = "log"
    return {
        "data": [
            {
                "type": "heatmap",
                "x": columns,
                "y": rows,
                "z": table,
                "colorscale": "Viridis",
                "colorbar": {"title": {"text": _last(metric)}, "thickness": 12},
                "hoverinfo": "skip",
            },
            {
                "type": "scatter",
                "mode": "markers",
                **values,
                "customdata": [t.metrics[metric] for t in trials],
                "hovertemplate": f"%{{text}}<br>{metric} %{{customdata:.4f}}<extra></extra>",
                "marker": {"color": "white", "size": 8, "line": {"color": "black", "width": 1.5}},
                "showlegend": False,
            },
        ],
        "layout": layout,
    }


def _curves(result: SweepResult) -> dict[str, Any]:
    """The objective over steps, one line for each trial; those that were stopped end early."""
    metric = result.objective.primary.metric
    lines = []
    for trial in result.trials:
        history = [entry for entry in trial.history if metric in entry]
        if not history:
            continue
        is_best = trial is result.best
        lines.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"{trial.id[-5:]} {trial.status}",
                "x": [entry["step"] for entry in history],
                "y": [entry[metric] for entry in history],
                "line": {"width": 3 if is_best else 1.5, **({"color": _ACCENT} if is_best else {})},
                "marker": {"size": 6 if is_best else 4},
                "hovertemplate": f"{_hover(trial)}<br>step %{{x}}<br>{metric} %{{y:.4f}}<extra></extra>",
            }
        )
    return {"data": lines, "layout": _axes("step", metric)}


def _parallel(result: SweepResult, paths: Sequence[str]) -> dict[str, Any]:
    """Every trial as a line through its values, its metrics and its steps."""
    goals = result.frontier_goals
    trials = [
        t
        for t in result.trials
        if t.is_ranked and all(p in t.overrides for p in paths) and all(g.metric in t.metrics for g in goals)
    ]
    dimensions: list[dict[str, Any]] = []
    for path in paths:
        values = [float(t.overrides[path]) for t in trials]
        is_log = bool(values) and min(values) > 0 and max(values) / min(values) > 10
        shown = [math.log10(v) for v in values] if is_log else values
        ticks = sorted({min(shown), max(shown)}) if shown else []
        texts = [f"{10**tick if is_log else tick:.2g}" for tick in ticks]
        dimensions.append({"label": path, "values": shown, "tickvals": ticks, "ticktext": texts})
    dimensions += [{"label": _last(g.metric), "values": [t.metrics[g.metric] for t in trials]} for g in goals]
    dimensions.append({"label": "steps", "values": [t.step for t in trials]})
    colours = [t.metrics[goals[0].metric] for t in trials]
    line = {"color": colours, "colorscale": "Viridis"}
    layout = {"margin": {"l": 70, "r": 70, "t": 60, "b": 30}}
    return {"data": [{"type": "parcoords", "line": line, "dimensions": dimensions}], "layout": layout}


def _steps(result: SweepResult) -> dict[str, Any]:
    """How far each trial came, and what stopping it saved."""
    names = [t.id[-5:] for t in result.trials]
    left = [max(t.total_steps - t.step, 0) if t.status != "finished" else 0 for t in result.trials]
    texts = [f"{_hover(t)}<br>{t.status} {t.reason}" for t in result.trials]
    common = {"type": "bar", "orientation": "h", "y": names, "text": texts, "textposition": "none"}
    layout = {**_axes("steps", ""), "barmode": "stack"}
    layout["yaxis"] = {"autorange": "reversed", "type": "category", "automargin": True}
    hover = "%{text}<br>%{x} steps<extra></extra>"
    return {
        "data": [
            {**common, "name": "run", "x": [t.step for t in result.trials], "marker": {"color": _PLAIN}}
            | {"hovertemplate": hover},
            {**common, "name": "not run", "x": left, "marker": {"color": _BAD}} | {"hovertemplate": hover},
        ],
        "layout": layout,
    }


def _axes(across: str, up: str) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": across}, "automargin": True},
        "yaxis": {"title": {"text": up}, "automargin": True},
        "margin": {"l": 50, "r": 20, "t": 20, "b": 50},
        "legend": {"orientation": "h", "y": -0.25},
        "hovermode": "closest",
    }


def _hover(trial: TrialRecord) -> str:
    values = "<br>".join(f"{path} {_short(value)}" for path, value in trial.overrides.items())
    return f"<b>trial {trial.id}</b><br>{values}"


def _numeric_paths(trials: Sequence[TrialRecord]) -> list[str]:
    """Paths that vary in numbers, beta and the learning rate first."""
    values: dict[str, set[float]] = {}
    for trial in trials:
        for path, value in trial.overrides.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault(path, set()).add(float(value))
    varied = [path for path, found in values.items() if len(found) > 1]
    return sorted(varied, key=lambda path: (not path.endswith(".beta"), not path.endswith(".lr"), path))


def _bins(values: Sequence[float]) -> list[float]:
    """Edges of at most eight cells, even on a logarithmic scale where the values span more than tenfold."""
    low, high = min(values), max(values)
    count = min(8, max(2, len(set(values))))
    if low > 0 and high / low > 10:
        ratio = (high / low) ** (1 / count)
        return [low * ratio**i for i in range(count)] + [high]
    width = (high - low) / count or 1.0
    return [low + width * i for i in range(count)] + [high if high > low else low + width * count]


def _bin(edges: Sequence[float], value: float) -> int:
    below = sum(edge <= value for edge in edges[1:-1])
    return min(below, len(edges) - 2)


def _last(metric: str) -> str:
    return metric.rpartition("/")[2]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).rpartition(".")[2] or str(value)
