"""The words and tables of a report, as HTML."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_dpo.tuning.report.labels import duration, metric_name, number, path_names, value_text
from lightning_dpo.tuning.results.result import KL, SweepResult
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["facts", "failures", "headline", "lead", "settings", "table", "trials"]


def headline(result: SweepResult) -> str:
    """What won, in one sentence."""
    best, goal = result.best, result.objective.primary
    if not best.is_ranked or goal.metric not in best.metrics:
        return "Every trial went wrong"
    names = _names(result)
    # No line ends within "β = 0.1".
    values = [f"{names[path]}\u00a0=\u00a0{value_text(value)}" for path, value in best.overrides.items()]
    measured = [
        f"{metric_name(metric)}\u00a0{number(best.metrics[metric])}"
        for metric in _metrics(result)
        if metric in best.metrics
    ]
    chosen = ", ".join(f"<b>{html.escape(value)}</b>" for value in values)
    return f"{chosen} reached {html.escape(' at '.join(measured[:2]))}"


def lead(result: SweepResult) -> str:
    """How the sweep went, in a sentence or two."""
    counts = _counts(result)
    wrong = sum(count for status, count in counts.items() if status not in ("finished", "stopped"))
    stopped = counts.get("stopped", 0)
    text = f"{_trial_count(len(result.trials))} in {duration(result.seconds)}: "
    text += f"{counts.get('finished', 0)} finished"
    if stopped or not wrong:
        text += f", {stopped} stopped early by {_scheduler(result)}" if stopped else ", none stopped early"
    text += f", {wrong} went wrong. " if wrong else ". "
    saved, planned = _saved(result)
    if saved:
        text += f"Stopping saved {saved:,} of {planned:,} steps ({saved / planned:.0%}). "
    text += f"Passes of the reference over the data: {result.reference_passes}."
    starts = [t.startup_seconds for t in result.trials if t.startup_seconds is not None]
    if starts:
        low, high = f"{min(starts):.1f}", f"{max(starts):.1f}"
        text += f" Start-up of a trial: {low if low == high else f'{low} to {high}'} s."
    return html.escape(text)


def facts(result: SweepResult) -> str:
    """The numbers that people look for first."""
    best, (saved, planned) = result.best, _saved(result)
    shown = {
        f"best {metric_name(metric)}" if place == 0 else f"its {metric_name(metric)}": number(
            best.metrics[metric]
        )
        for place, metric in enumerate(_metrics(result))
        if best.is_ranked and metric in best.metrics
    }
    shown |= {
        "trials": str(len(result.trials)),
        "steps saved": f"{saved / planned:.0%}" if planned else "0%",
        "reference passes": str(result.reference_passes),
        "wall time": duration(result.seconds),
    }
    boxes = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in shown.items()
    )
    return f'<dl class="facts">{boxes}</dl>'


def trials(result: SweepResult) -> str:
    """All trials, best first."""
    metrics, names = _metrics(result), _names(result)
    if any("val/logratio/margin" in trial.metrics for trial in result.trials):
        metrics = list(dict.fromkeys([*metrics, "val/logratio/margin"]))
    pareto = {trial.id for trial in result.frontier} if len(result.frontier_goals) > 1 else set()

    def row(place: int, trial: TrialRecord) -> list[str]:
        found = [trial.metrics.get(metric) for metric in metrics]
        return [
            str(place + 1) if trial.is_ranked else "–",
            trial.id + (" ◆" if trial.id in pareto else ""),
            *("" if value is None else number(value, 4, pad=True) for value in found),
            *(value_text(trial.overrides[path]) if path in trial.overrides else "" for path in names),
            f"{trial.step:,} of {trial.total_steps:,}" if trial.total_steps else "0",
            trial.status + (f", {trial.starts} starts" if trial.starts > 1 else ""),
        ]

    header = ("rank", "trial", *map(metric_name, metrics), *names.values(), "steps", "status")
    titles = dict(zip(header[2:], (*metrics, *names), strict=False))
    rows = [row(place, trial) for place, trial in enumerate(result.trials)]
    marked = 0 if result.best.is_ranked else None
    numeric = tuple(range(2, 2 + len(metrics)))
    return table(header, rows, "trials", titles=titles, right=numeric, marked=marked, tall=len(rows) > 14)


def failures(result: SweepResult) -> str:
    """The trials that went wrong, and why; nothing where all went well."""
    wrong = [trial for trial in result.trials if not trial.is_ranked]
    if not wrong:
        return ""
    names = _names(result)

    def item(trial: TrialRecord) -> str:
        values = ", ".join(f"{names[path]} = {value_text(value)}" for path, value in trial.overrides.items())
        reached = f"last report at step {trial.step}" if trial.history else "before its first report"
        where = html.escape(f"trial {trial.id}, {reached}")
        reason = html.escape(trial.reason or "no reason was recorded")
        return (
            f'<li><b>{html.escape(trial.status)}</b> <span class="note">{where}</span>'
            f'<p>{reason}</p><p class="note">{html.escape(values)}</p></li>'
        )

    return (
        '<section id="wrong"><h2>Trials that went wrong</h2>'
        '<p class="note">They take no part in the ranking; the others went on.</p>'
        f'<ul class="failures">{"".join(map(item, wrong))}</ul></section>'
    )


def settings(result: SweepResult) -> str:
    """The sweep's configuration, as JSON."""
    return html.escape(json.dumps(result.settings, indent=2, default=str, ensure_ascii=False))


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    name: str,
    *,
    titles: Mapping[str, str] | None = None,
    right: Sequence[int] = (),
    words: Sequence[int] = (),
    marked: int | None = None,
    tall: bool = False,
) -> str:
    """A table that scrolls within its own frame.

    Args:
        header: Names of the columns.
        rows: The cells' texts.
        name: What it holds, for people who do not see it.
        titles: Shown when the pointer rests on a column's name.
        right: Numbers of columns that are aligned to the right.
        words: Numbers of columns whose text may wrap.
        marked: Number of a row to mark.
        tall: Scroll up and down as well.
    """
    kinds = {**dict.fromkeys(right, ' class="right"'), **dict.fromkeys(words, ' class="words"')}
    head = "".join(
        f'<th scope="col"{kinds.get(n, "") if n in right else ""}'
        + (f' title="{html.escape(titles[text])}"' if titles and text in titles else "")
        # Long names may break after an underscore.
        + f">{html.escape(text).replace('_', '_<wbr>')}</th>"
        for n, text in enumerate(header)
    )
    body = "".join(
        ('<tr class="best">' if n == marked else "<tr>")
        + "".join(f"<td{kinds.get(c, '')}>{html.escape(cell)}</td>" for c, cell in enumerate(cells))
        + "</tr>"
        for n, cells in enumerate(rows)
    )
    kind = "scroll tall" if tall else "scroll"
    frame = f'<div class="{kind}" tabindex="0" role="region" aria-label="Table: {html.escape(name)}">'
    return f"{frame}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _names(result: SweepResult) -> dict[str, str]:
    return path_names(path for trial in result.trials for path in trial.overrides)


def _metrics(result: SweepResult) -> list[str]:
    measured = [KL] if any(KL in trial.metrics for trial in result.trials) else []
    return list(dict.fromkeys([*(goal.metric for goal in result.frontier_goals), *measured]))


def _counts(result: SweepResult) -> dict[str, int]:
    counts: dict[str, int] = {}
    for trial in result.trials:
        counts[trial.status] = counts.get(trial.status, 0) + 1
    return counts


def _saved(result: SweepResult) -> tuple[int, int]:
    """Steps that stopping saved, and those that all trials would have taken."""
    planned = sum(max(t.total_steps, t.step) for t in result.trials)
    return sum(max(t.total_steps - t.step, 0) for t in result.trials if t.status == "stopped"), planned


def _scheduler(result: SweepResult) -> str:
    given: Any = result.settings.get("scheduler", "the scheduler")
    return value_text(given.get("class_path", "the scheduler") if isinstance(given, Mapping) else given)


def _trial_count(count: int) -> str:
    return "1 trial" if count == 1 else f"{count} trials"
