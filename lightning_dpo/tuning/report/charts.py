"""The charts of a report, as plotly figures in plain JSON values.

Colours are names of the page's style sheet, such as ``var(--best)``, so that they follow light and dark.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_dpo.tuning.report.axes import axis, layout
from lightning_dpo.tuning.report.labels import metric_name, number, path_names, value_text
from lightning_dpo.tuning.results.result import KL, SweepResult
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["Chart", "charts", "hover_text"]

BEST, PARETO, FINISHED, STOPPED, WRONG = (
    f"var(--{name})" for name in ("best", "pareto", "finished", "stopped", "wrong")
)


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart.

    Attributes:
        title: Its heading.
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


def charts(result: SweepResult) -> list[Chart]:
    """All charts that the sweep has data for."""
    from lightning_dpo.tuning.report.space_charts import heat_map, parallel

    makers: tuple[Callable[[SweepResult], Chart | None], ...] = (
        _trade_off,
        heat_map,
        _curves,
        parallel,
        _steps,
    )
    return [chart for chart in (make(result) for make in makers) if chart is not None]


def hover_text(trial: TrialRecord, result: SweepResult) -> str:
    """All that is known of a trial, in lines."""
    names = path_names(path for t in result.trials for path in t.overrides)
    lines = [f"<b>trial {trial.id}</b>"]
    lines += [f"{names[path]} = {html.escape(value_text(value))}" for path, value in trial.overrides.items()]
    for metric in dict.fromkeys([*(goal.metric for goal in result.frontier_goals), KL]):
        if metric in trial.metrics:
            error = trial.metrics.get(f"{metric}_error")
            spread = f" ± {number(error, 2)}" if error is not None else ""
            lines.append(f"{metric_name(metric)} {number(trial.metrics[metric])}{spread}")
    lines.append(f"step {trial.step} of {trial.total_steps or '?'}, {trial.status}")
    return "<br>".join(lines)


def _trade_off(result: SweepResult) -> Chart | None:
    """The first two goals of the frontier against each other, the Pareto set joined and marked."""
    if len(result.frontier_goals) < 2:
        return None
    up, across = result.frontier_goals[:2]
    shown = [
        t for t in result.trials if t.is_ranked and up.metric in t.metrics and across.metric in t.metrics
    ]
    pareto = sorted((t for t in result.frontier if t in shown), key=lambda t: t.metrics[across.metric])

    def points(trials: Sequence[TrialRecord], **style: Any) -> dict[str, Any]:
        return {
            "type": "scatter",
            "x": [t.metrics[across.metric] for t in trials],
            "y": [t.metrics[up.metric] for t in trials],
            "text": [hover_text(t, result) for t in trials],
            "hovertemplate": "%{text}<extra></extra>",
            **style,
        }

    def dots(status: str, colour: str, symbol: str) -> dict[str, Any]:
        trials = [t for t in shown if t not in pareto and t.status == status]
        marker = {"color": colour, "size": 9, "symbol": symbol, "line": {"width": 1.5, "color": colour}}
        return points(trials, mode="markers", name=status, marker=marker)

    data = [dots("stopped", STOPPED, "circle-open"), dots("finished", FINISHED, "circle")]
    data.append(
        points(
            pareto,
            mode="lines+markers",
            name="Pareto set",
            marker={"color": PARETO, "size": 12, "symbol": "diamond"},
            # Between two trials nothing better than the left one is known.
            line={"color": PARETO, "width": 2, "shape": "hv" if across.mode == "min" else "vh"},
        )
    )
    best = [trial for trial in shown if trial is result.best]
    data.append(points(best, mode="markers", name="best", marker=_star()))
    data = [trace for trace in data if trace["x"]]
    if not data:
        return None
    names = metric_name(up.metric), metric_name(across.metric)
    left_out = len(result.trials) - len(shown)
    better = f"{'up' if up.mode == 'max' else 'down'} and {'left' if across.mode == 'min' else 'right'}"
    note = (
        f"Better is {better}. The line joins the Pareto set: trials that no other one beats in both at once."
    )
    if left_out:
        note += f" {left_out} that went wrong {'is' if left_out == 1 else 'are'} not shown."
    places = layout(axis(names[1], [t.metrics[across.metric] for t in shown]), axis(names[0], []))
    return Chart(f"{_capital(names[0])} against {names[1]}", note, data, places)


def _curves(result: SweepResult) -> Chart:
    """The objective over steps; the curves of one kind are one trace, with gaps between trials."""
    goal = result.objective.primary
    name = metric_name(goal.metric)
    best = [t for t in result.trials[:1] if t.is_ranked]
    rest = [t for t in result.trials if t not in best]
    groups = (
        ("stopped early", STOPPED, "circle-open", [t for t in rest if t.is_ranked and t.status == "stopped"]),
        ("finished", FINISHED, "circle", [t for t in rest if t.is_ranked and t.status == "finished"]),
        ("went wrong", WRONG, "x", [t for t in rest if not t.is_ranked]),
        ("best", BEST, "star", best),
    )
    data = []
    for label, colour, symbol, trials in groups:
        xs: list[Any] = []
        ys: list[Any] = []
        texts: list[str] = []
        sizes: list[int] = []
        for trial in trials:
            history = [entry for entry in trial.history if goal.metric in entry]
            text = hover_text(trial, result)
            xs += [*(entry["step"] for entry in history), None]
            ys += [*(entry[goal.metric] for entry in history), None]
            texts += [f"{text}<br><br>at step {e['step']}: {name} {number(e[goal.metric])}" for e in history]
            texts.append("")
            # A larger mark where the curve ends.
            sizes += [*([4] * (len(history) - 1)), *([9 if label != "best" else 13] * bool(history)), 0]
        if any(x is not None for x in xs):
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": label,
                    "x": xs,
                    "y": ys,
                    "text": texts,
                    "connectgaps": False,
                    "opacity": 1 if label == "best" else 0.75,
                    "line": {"width": 3 if label == "best" else 1.5, "color": colour},
                    "marker": {
                        "size": sizes,
                        "symbol": symbol,
                        "color": colour,
                        "opacity": 1,
                        "line": {"width": 1.5, "color": colour},
                    },
                    "hovertemplate": "%{text}<extra></extra>",
                }
            )
    note = f"Validation {name} at each report; a curve that ends early was stopped or went wrong there."
    return Chart("Learning curves", note, data, layout(axis("step", []), axis(name, [])))


def _steps(result: SweepResult) -> Chart:
    """How far each trial came, best first, and what stopping it saved."""
    trials = result.trials
    ids = [t.id for t in trials]
    texts = [hover_text(t, result) + (f"<br>{_wrapped(t.reason)}" if t.reason else "") for t in trials]
    kinds = (
        ("finished", FINISHED, "", lambda t: t.status == "finished"),
        ("stopped early", STOPPED, "", lambda t: t.status == "stopped"),
        ("went wrong", WRONG, "x", lambda t: not t.is_ranked),
    )
    common: dict[str, Any] = {
        "type": "bar",
        "hovertemplate": "%{text}<extra></extra>",
        "textposition": "none",
    }
    data = []
    for name, colour, shape, belongs in kinds:
        chosen = [number for number, trial in enumerate(trials) if belongs(trial)]
        if chosen:
            marker = {"color": colour, "pattern": {"shape": shape, "size": 5}}
            data.append(
                common
                | {"name": name, "x": [ids[n] for n in chosen], "y": [trials[n].step for n in chosen]}
                | {"text": [texts[n] for n in chosen], "marker": marker}
            )
    left = [max(t.total_steps - t.step, 0) if t.status != "finished" else 0 for t in trials]
    if any(left):
        faint = {"color": "var(--faint)"}
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


def _star() -> dict[str, Any]:
    return {"color": BEST, "size": 17, "symbol": "star", "line": {"width": 1, "color": "var(--page)"}}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _wrapped(text: str, width: int = 44) -> str:
    import textwrap

    lines: Iterable[str] = textwrap.wrap(text, width)[:4]
    return "<br>".join(html.escape(line) for line in lines)
