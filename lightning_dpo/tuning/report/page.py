"""The report of a sweep: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lightning_dpo.tuning.report import sections
from lightning_dpo.tuning.report.charts import draw_charts
from lightning_dpo.tuning.report.charts.chart import Chart
from lightning_dpo.tuning.report.formatting import format_value
from lightning_dpo.tuning.report.summary import parameter_labels
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.storage import Storage

__all__ = ["fill_template", "render", "write_report"]


def write_report(result: SweepResult) -> None:
    """Write `report.html` into the sweep's folder."""
    Storage(result.location).write("report.html", render(result))


def render(result: SweepResult) -> str:
    """The report as HTML, plotly's script included: 4.8 MB, most of it plotly."""
    return fill_template(
        "page.html",
        charts=draw_charts(result),
        result=result,
        headline=sections.headline(result),
        lead=sections.lead(result),
        recommendation=sections.recommendation(result),
        facts=sections.facts(result),
        trials=sections.trials(result),
        trials_note=sections.trials_note(result),
        labels=parameter_labels(result),
        failures=[trial for trial in (*result.trials, *result.reruns) if not trial.is_ranked],
        environment=[(name, format_value(value)) for name, value in result.environment.items()],
    )


def fill_template(name: str, *, charts: Sequence[Chart], **values: Any) -> str:
    """A page as HTML, plotly's script included; whatever is not `Markup` is escaped.

    Args:
        name: The template's file.
        charts: The page's charts, in their order.
        values: What else the template shows; of a `result` its name and its settings are shown too.
    """
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("lightning_dpo.tuning.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["value_text"] = format_value
    # Charts keep the order of their fields; a value that JSON does not know is shown as text.
    environment.policies["json.dumps_kwargs"] = {"default": str}
    if "result" in values:
        result = values["result"]
        values["name"] = result.location.rstrip("/").rpartition("/")[2]
        values["settings"] = json.dumps(result.settings, indent=2, default=str, ensure_ascii=False)
    return environment.get_template(name).render(
        charts=charts,
        figures=[_finite({"data": chart.data, "layout": chart.layout}) for chart in charts],
        plotly=Markup(get_plotlyjs()),
        **values,
    )


def _finite(value: Any) -> Any:
    """A figure without numbers that JSON does not have: a browser would draw no chart at all."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
