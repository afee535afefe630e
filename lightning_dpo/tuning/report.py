"""The report of a sweep: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_dpo.tuning.charts import charts
from lightning_dpo.tuning.records import TrialRecord
from lightning_dpo.tuning.results import SweepResult
from lightning_dpo.tuning.storage import Storage

__all__ = ["render", "write_report"]

_STYLE = """
:root { color-scheme: light; --line: #d4d4d8; --muted: #52525b; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .75rem; }
.facts div { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.facts b { display: block; font-size: 1.25rem; overflow-wrap: anywhere; }
.facts span, .note { color: var(--muted); font-size: .9rem; }
.chart { height: 420px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; white-space: nowrap; }
td.reason { white-space: normal; min-width: 12rem; }
tr.best { background: #fff7ed; }
pre { background: #f4f4f5; border-radius: 8px; padding: 1rem; overflow-x: auto; max-height: 28rem; }
button { font: inherit; padding: .3rem .9rem; border: 1px solid var(--line); border-radius: 6px; }
"""

_SCRIPT = """
const specs = JSON.parse(document.getElementById("charts").textContent);
specs.forEach((spec, i) => Plotly.newPlot("chart" + i, spec.data, spec.layout,
  {responsive: true, displaylogo: false}));
document.getElementById("copy").addEventListener("click", async (event) => {
  const text = document.getElementById("recipe").textContent;
  try { await navigator.clipboard.writeText(text); }
  catch {
    const range = document.createRange();
    range.selectNodeContents(document.getElementById("recipe"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    document.execCommand("copy");
  }
  event.target.textContent = "copied";
});
"""


def write_report(result: SweepResult) -> None:
    """Write `report.html` into the sweep's folder."""
    Storage(result.location).write("report.html", render(result))


def render(result: SweepResult) -> str:
    """The report as HTML, plotly's script included."""
    from plotly.offline import get_plotlyjs

    drawn = charts(result)
    sections = "".join(
        f'<h2>{html.escape(title)}</h2><div class="chart" id="chart{number}"></div>'
        for number, title in enumerate(drawn)
    )
    # Within a script element only "</" could end the data early.
    data = json.dumps(list(drawn.values()), default=str).replace("</", "<\\/")
    title = f"Sweep {result.location.rpartition('/')[2]}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{_facts(result)}
{sections}
{_scheduler(result)}
<h2>Trials</h2>
{_trials(result)}
<h2>The winning recipe</h2>
<p class="note">Save it as config.yaml: lightning-dpo fit --config config.yaml</p>
<button id="copy">copy</button>
<pre id="recipe">{html.escape(result.recipe)}</pre>
<h2>Environment and settings</h2>
{_table(("", ""), [(name, _plain(value)) for name, value in result.environment.items()])}
<details><summary>The sweep's settings</summary>
<pre>{html.escape(json.dumps(result.settings, indent=2, default=str))}</pre></details>
<script>{get_plotlyjs()}</script>
<script type="application/json" id="charts">{data}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _facts(result: SweepResult) -> str:
    goal = result.objective.primary
    best = result.best
    facts = {
        f"best {goal.metric}": f"{best.metrics[goal.metric]:.4f}",
        **{f"its {path}": _plain(value) for path, value in best.overrides.items()},
        "trials": str(len(result.trials)),
        "reference passes": str(result.reference_passes),
        "wall time": f"{result.seconds:.0f} s",
    }
    boxes = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in facts.items()
    )
    return f'<div class="facts">{boxes}</div>'


def _scheduler(result: SweepResult) -> str:
    run = sum(t.step for t in result.trials)
    planned = sum(max(t.total_steps, t.step) for t in result.trials)
    stopped = [t for t in result.trials if t.status == "stopped"]
    saved = sum(max(t.total_steps - t.step, 0) for t in stopped)
    name = result.settings.get("scheduler", "none")
    share = f" ({saved / planned:.0%})" if planned else ""
    text = (
        f"{_plain(name)} stopped {len(stopped)} of {len(result.trials)} trials and saved {saved} of "
        f"{planned} steps{share}; {run} were run."
    )
    starts = [t.startup_seconds for t in result.trials if t.startup_seconds is not None]
    if starts:
        text += f" Start-up of a trial: {min(starts):.1f} to {max(starts):.1f} s."
    return f"<h2>What the scheduler saved</h2><p>{html.escape(text)}</p>"


def _trials(result: SweepResult) -> str:
    metrics = list(dict.fromkeys([*(g.metric for g in result.frontier_goals), "val/logratio/margin"]))
    paths = list(dict.fromkeys(path for t in result.trials for path in t.overrides))
    pareto = {t.id for t in result.frontier}

    def row(trial: TrialRecord) -> Iterable[str]:
        yield trial.id + (" ◆" if trial.id in pareto else "")
        yield trial.status
        yield f"{trial.step}/{trial.total_steps or '?'}"
        for metric in metrics:
            value = trial.metrics.get(metric)
            yield "" if value is None else f"{value:.4f}"
        for path in paths:
            yield _plain(trial.overrides.get(path, ""))
        yield str(trial.starts)
        yield trial.reason

    header = ("trial", "status", "steps", *metrics, *paths, "starts", "reason")
    note = '<p class="note">◆ no other trial is better in all of the first metrics at once.</p>'
    return _table(header, [tuple(row(t)) for t in result.trials], best=True) + note


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, best: bool = False) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = []
    for number, cells in enumerate(rows):
        marked = ' class="best"' if best and number == 0 else ""
        *short, last = (html.escape(cell) for cell in cells)
        plain = "".join(f"<td>{cell}</td>" for cell in short)
        body.append(f'<tr{marked}>{plain}<td class="reason">{last}</td></tr>')
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, default=str) if isinstance(value, Mapping | list) else str(value)
