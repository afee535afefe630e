"""The chart of a realigned family: accuracy or score against KL, beside the trials of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from markupsafe import Markup

from lightning_dpo.evaluation.kl import Estimate
from lightning_dpo.evaluation.realign import RealignedPoint
from lightning_dpo.tuning.objective import KL
from lightning_dpo.tuning.report.charts.axes import axis, layout
from lightning_dpo.tuning.report.charts.chart import (
    HOVER,
    Chart,
    Colour,
    capitalised,
    hover_lines,
    trial_points,
)
from lightning_dpo.tuning.report.formatting import format_number
from lightning_dpo.tuning.results.result import SweepResult

__all__ = ["realignment"]

_ACCURACY = "val/rewards/accuracy"


def realignment(
    points: Sequence[RealignedPoint],
    *,
    of: Literal["accuracy", "score"] = "accuracy",
    sweep: SweepResult | None = None,
) -> Chart | None:
    """The members of a family along their KL, joined in the order of lambda; None where nothing is known.

    Args:
        points: The members.
        of: What is shown against the KL.
        sweep: Whose trials to draw beside them, where these logged KL and accuracy.
    """
    members = sorted(points, key=lambda point: point.scale)
    up = [point.pairs.accuracy if of == "accuracy" else point.score for point in members]
    known = [(point, value) for point, value in zip(members, up, strict=True) if value is not None]
    if not known:
        return None
    sampled = all(point.kl is not None for point, _ in known)
    across = [point.kl or Estimate(point.pairs.kl_on_pairs, 0.0) for point, _ in known]
    label = "KL" if sampled else "KL along the pairs"
    family = {
        "type": "scatter",
        "mode": "lines+markers+text",
        "name": "realigned",
        "x": [kl.mean for kl in across],
        "y": [value.mean for _, value in known],
        "error_x": _bars(across),
        "error_y": _bars([value for _, value in known]),
        "text": [f"λ {point.scale:g}" for point, _ in known],
        "textposition": "bottom right",
        "customdata": [_hover(point) for point, _ in known],
        "hovertemplate": "%{customdata}<extra></extra>",
        "marker": {"color": Colour.BEST, "size": 10},
        "line": {"color": Colour.BEST, "width": 2},
    }
    traces = [*(_trials(sweep) if of == "accuracy" and sampled and sweep is not None else []), family]
    note = "λ = 0 is the reference and λ = 1 the policy. Bars are one standard error."
    if len(traces) > 1 and sweep is not None:
        note += " Dots are trials that were trained; the KL is of samples of their own"
        tokens = sweep.settings.get("kl_tokens")
        note += f", of up to {tokens} tokens." if tokens else "."
    # Trials may lie far beyond the family, which alone is drawn to scale.
    far = [kl for trace in traces for kl in trace["x"]] if len(traces) > 1 else []
    places = layout(axis(f"{label}, nats a completion", far), axis(of, []))
    return Chart(f"{capitalised(of)} against {label}", note, traces, places)


def _trials(sweep: SweepResult) -> list[dict[str, Any]]:
    shown = [t for t in sweep.trials if t.is_ranked and KL in t.metrics and _ACCURACY in t.metrics]
    if not shown:
        return []
    x, y = ([trial.metrics[name] for trial in shown] for name in (KL, _ACCURACY))
    marker = {"color": Colour.FINISHED, "size": 9}
    return [trial_points(shown, sweep, x=x, y=y, name="trained trials", marker=marker, hovertemplate=HOVER)]


def _bars(estimates: Sequence[Estimate]) -> dict[str, Any]:
    errors = [e.standard_error if e.standard_error == e.standard_error else 0.0 for e in estimates]
    return {"type": "data", "array": errors, "color": Colour.STOPPED, "thickness": 1.5}


def _hover(point: RealignedPoint) -> Markup:
    lines: list[str] = [Markup("<b>λ = {}</b>").format(f"{point.scale:g}")]
    named = {"accuracy": point.pairs.accuracy, "KL": point.kl, "score": point.score}
    for name, value in named.items():
        if value is not None:
            lines.append(f"{name} {format_number(value.mean)} ± {format_number(value.standard_error, 2)}")
    return hover_lines(*lines)
