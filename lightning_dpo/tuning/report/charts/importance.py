"""The chart of parameter importance."""

from __future__ import annotations

from lightning_dpo.tuning.report.charts.axes import axis, layout
from lightning_dpo.tuning.report.charts.chart import Chart, Colour
from lightning_dpo.tuning.report.formatting import metric_label
from lightning_dpo.tuning.report.summary import parameter_labels
from lightning_dpo.tuning.results.importance import parameter_importance
from lightning_dpo.tuning.results.result import SweepResult

__all__ = ["importance"]

_METHODS = {
    "fANOVA": "The share of its variance that each explains on its own, by fANOVA",
    "PED-ANOVA": "How much the values of the better half differ from those of all, by PED-ANOVA",
}
_FEW = 32


def importance(result: SweepResult) -> Chart | None:
    """How much each parameter matters for the objective; the note has the same numbers as text."""
    found = parameter_importance(result)
    if found is None:
        return None
    labels = parameter_labels(result)
    label = metric_label(result.objective.primary.metric)
    told = ", ".join(f"{labels[path]} {share:.0%}" for path, share in found.shares.items())
    note = f"For {label}: {told}. {_METHODS[found.method]}, over the {found.trials} trials that finished."
    if found.left_out:
        note += f" Not every one of them sets {', '.join(labels[path] for path in found.left_out)}."
    if found.trials < _FEW:
        note += " From so few it is rough."
    # Plotly draws the first bar lowest.
    paths = list(found.shares)[::-1]
    bars = {
        "type": "bar",
        "orientation": "h",
        "name": "importance",
        "x": [found.shares[path] for path in paths],
        "y": [labels[path] for path in paths],
        "text": [f"{found.shares[path]:.0%}" for path in paths],
        "hovertemplate": "%{y} %{text}<extra></extra>",
        "marker": {"color": Colour.FINISHED},
    }
    across = axis("importance", []) | {"tickformat": ".0%", "rangemode": "tozero"}
    up = axis("", []) | {"type": "category", "showgrid": False}
    return Chart("Parameter importance", note, [bars], layout(across, up, showlegend=False, bargap=0.35))
