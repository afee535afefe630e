"""The picture: reward against KL, a curve for each method, below the best that is reachable."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from lightning_dpo.tuning.frontier.result import FrontierResult, PolicyPoint
from lightning_dpo.tuning.report.charts.axes import axis, layout
from lightning_dpo.tuning.report.charts.chart import HOVER, Chart, hover_lines
from lightning_dpo.tuning.report.formatting import format_number

__all__ = ["reward_chart"]

_COLOURS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
"""Of the page's style sheet."""
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon", "triangle-down")
_DASHES = ("solid", "dash", "dot")
_BEYOND = 1.6
"""How far the axis goes past the largest KL of the comparison, at most, as a factor."""


def reward_chart(result: FrontierResult) -> Chart:
    """Reward against KL: each mark is one strength, the mean over its seeds."""
    furthest = max((point.kl for point in result.points), default=1.0)
    up_to = min(furthest * 1.05, _BEYOND * max(result.kls, default=furthest))
    traces = [_limit(result, up_to)]
    traces += [_curve(result, method, number) for number, method in enumerate(result.methods)]
    hidden = sum(point.kl > up_to for point in result.points)
    note = (
        "Each mark is one strength, the mean over its seeds; bars are standard errors of that mean, in both "
        "directions. No policy can lie above the dark line. Better is up and left."
    )
    if hidden:
        note += f" {hidden} of {len(result.points)} policies lie further right; zoom out to see them."
    across = axis("KL from the reference, nats", []) | {"range": [0, up_to]}
    rewards = [result.limit.reference, *(p.reward for p in result.points if p.kl <= up_to)]
    rewards += traces[0]["y"]
    free = 0.06 * (max(rewards) - min(rewards))
    up = axis("mean reward", []) | {"range": [min(rewards) - free, max(rewards) + free]}
    places = layout(across, up)
    return Chart("Reward against KL", note, traces, places, min_width=520)


def _limit(result: FrontierResult, up_to: float) -> dict[str, Any]:
    """The best that is reachable, from the reference on, as far as samples tell."""
    points = result.limit.curve(up_to=up_to)
    text = [
        hover_lines(
            Markup("<b>best reachable</b>"),
            f"reward {format_number(p.reward)} at KL {format_number(p.kl)}",
            f"{p.effective_sample_size:.0f} effective samples",
        )
        for p in points
    ]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "best reachable",
        "x": [p.kl for p in points],
        "y": [p.reward for p in points],
        "text": text,
        "hovertemplate": HOVER,
        "line": {"color": "var(--text)", "width": 3},
    }


def _curve(result: FrontierResult, method: str, number: int) -> dict[str, Any]:
    groups = _strengths([point for point in result.points if point.method == method])
    groups.sort(key=lambda group: statistics.fmean(point.kl for point in group))
    kls, rewards = (
        [
            _mean_and_error([(getattr(p, name), getattr(p, f"{name}_error")) for p in group])
            for group in groups
        ]
        for name in ("kl", "reward")
    )
    colour = f"var(--{_COLOURS[number % len(_COLOURS)]})"
    bars = {"color": colour, "thickness": 1.2, "width": 3}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": method,
        "x": [mean for mean, _ in kls],
        "y": [mean for mean, _ in rewards],
        "error_x": {"type": "data", "array": [error for _, error in kls], **bars},
        "error_y": {"type": "data", "array": [error for _, error in rewards], **bars},
        "text": [_hover(result, method, group) for group in groups],
        "hovertemplate": HOVER,
        "marker": {"color": colour, "size": 9, "symbol": _SYMBOLS[number % len(_SYMBOLS)]},
        "line": {"color": colour, "width": 2, "dash": _DASHES[number // len(_COLOURS) % len(_DASHES)]},
    }


def _strengths(points: Sequence[PolicyPoint]) -> list[list[PolicyPoint]]:
    strengths = dict.fromkeys(point.strength for point in points)
    return [[point for point in points if point.strength == strength] for strength in strengths]


def _mean_and_error(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean over seeds with its standard error; of one seed, the error of its samples."""
    means = [mean for mean, _ in values]
    if len(means) == 1:
        return values[0]
    return statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means))


def _hover(result: FrontierResult, method: str, group: Sequence[PolicyPoint]) -> Markup:
    what = result.strengths.get(method, "strength")
    lines: list[str] = [
        Markup("<b>{}</b>").format(method),
        f"{what} = {format_number(group[0].strength)}",
    ]
    for point in group:
        share = "" if math.isnan(point.share_of_limit) else f", {point.share_of_limit:.0%} of the limit"
        lines.append(
            f"seed {point.seed}: reward {format_number(point.reward)} at KL {format_number(point.kl)}{share}"
        )
    return hover_lines(*lines)
