"""The report of a sweep: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from importlib.resources import files

from lightning_dpo.tuning.report.charts import Chart, charts
from lightning_dpo.tuning.report.labels import value_text
from lightning_dpo.tuning.report.parts import facts, failures, headline, lead, settings, table, trials
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.storage import Storage

__all__ = ["render", "write_report"]


def write_report(result: SweepResult) -> None:
    """Write `report.html` into the sweep's folder."""
    Storage(result.location).write("report.html", render(result))


def render(result: SweepResult) -> str:
    """The report as HTML, plotly's script included: 4.8 MB, most of it plotly."""
    from plotly.offline import get_plotlyjs

    drawn = charts(result)
    name = result.location.rstrip("/").rpartition("/")[2]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>Sweep {html.escape(name)}</title>
<style>{_asset("report.css")}</style>
</head>
<body>
<header>
<p class="kicker">Sweep {html.escape(name)}</p>
<h1>{headline(result)}</h1>
<p class="lead">{lead(result)}</p>
{facts(result)}
{_contents(result)}
</header>
<main>
<noscript><p class="note">The charts need JavaScript.</p></noscript>
{"".join(_figures(drawn))}
{_recipe(result)}
<section id="trials"><h2>Trials</h2>
<p class="note">Best first.{" ◆ belongs to the Pareto set." if len(result.frontier_goals) > 1 else ""}</p>
{trials(result)}</section>
{failures(result)}
<section id="environment"><h2>Environment</h2>
{_environment(result)}
<details><summary>Settings of the sweep</summary>
<pre tabindex="0">{settings(result)}</pre></details></section>
</main>
<script>{get_plotlyjs()}</script>
<script type="application/json" id="charts">{_data(drawn)}</script>
<script>{_asset("report.js")}</script>
</body>
</html>
"""


def _contents(result: SweepResult) -> str:
    wrong = sum(not trial.is_ranked for trial in result.trials)
    places = {
        "winner": "The winning recipe" if result.recipe else "",
        "trials": "All trials",
        "wrong": f"{wrong} that went wrong" if wrong else "",
        "environment": "Environment",
    }
    links = (f'<a href="#{place}">{text}</a>' for place, text in places.items() if text)
    return f'<nav aria-label="Contents">{"".join(links)}</nav>'


def _environment(result: SweepResult) -> str:
    rows = [(name, value_text(value)) for name, value in result.environment.items()]
    return table(("what", "version or value"), rows, "environment", words=(1,))


def _figures(drawn: Iterable[Chart]) -> Iterable[str]:
    for number, chart in enumerate(drawn):
        width = f' style="min-width: {chart.min_width}px"' if chart.min_width else ""
        title, note = html.escape(chart.title), html.escape(chart.note)
        yield (
            f'<section aria-labelledby="title{number}"><h2 id="title{number}">{title}</h2>'
            f'<p class="note">{note}</p><div class="scroll"><div class="chart" id="chart{number}" role="img" '
            f'aria-label="Chart: {title}. {note}"{width}></div></div></section>\n'
        )


def _recipe(result: SweepResult) -> str:
    if not result.recipe:
        return ""
    recipe = html.escape(result.recipe)
    return f"""<section id="winner"><h2>The winning recipe</h2>
<div class="bar">
<p class="note">Save it as config.yaml, then <code>lightning-dpo fit --config config.yaml</code></p>
<button id="copy" type="button" aria-live="polite">Copy the recipe</button></div>
<pre id="recipe" tabindex="0" aria-label="The winning recipe, YAML">{recipe}</pre></section>"""


def _data(drawn: Iterable[Chart]) -> str:
    specs = [{"data": chart.data, "layout": chart.layout} for chart in drawn]
    # Within a script element "<!--" or "</" would be read as markup.
    return json.dumps(specs, default=str).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return files("lightning_dpo.tuning.report").joinpath(name).read_text(encoding="utf-8")
