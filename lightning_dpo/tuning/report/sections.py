"""What the sections of the report say, as texts that its templates escape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from lightning_dpo.tuning.report.comparison_table import format_difference, format_interval, format_p_value
from lightning_dpo.tuning.report.formatting import format_duration, format_number, format_value, metric_label
from lightning_dpo.tuning.report.summary import parameter_labels, shown_metrics, status_counts
from lightning_dpo.tuning.results.kept import runs_again_note
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["facts", "headline", "lead", "recommendation", "trials", "trials_note"]


def headline(result: SweepResult) -> Markup:
    """What won, in one sentence."""
    best, goal = result.best, result.objective.primary
    if not best.is_ranked or goal.metric not in best.metrics:
        return Markup("Every trial went wrong")
    labels = parameter_labels(result)
    # No line ends within "β = 0.1".
    values = Markup(", ").join(
        Markup("<b>{}\u00a0=\u00a0{}</b>").format(labels[path], format_value(value))
        for path, value in best.overrides.items()
    )
    measured = [
        f"{metric_label(metric)}\u00a0{_value(result, best, metric)}"
        for metric in shown_metrics(result)
        if metric in best.metrics
    ]
    found = result.mean(best)
    seeds = f" (mean of {found.runs}\u00a0seeds)" if found is not None and found.runs > 1 else ""
    return Markup("{} reached {}{}").format(values, " at ".join(measured[:2]), seeds)


def lead(result: SweepResult) -> str:
    """How the sweep went, in a sentence or two."""
    counts, count = status_counts(result), len(result.trials)
    stopped, finished = counts["stopped"], counts["finished"]
    wrong = count - stopped - finished
    text = (
        f"{count} trial{'s' if count != 1 else ''} in {format_duration(result.seconds)}: {finished} finished"
    )
    if stopped or not wrong:
        text += f", {stopped} stopped early by {_scheduler(result)}" if stopped else ", none stopped early"
    text += f", {wrong} went wrong. " if wrong else ". "
    saved, planned = _saved_steps(result)
    if saved:
        text += f"Stopping saved {saved:,} of {planned:,} steps ({saved / planned:.0%}). "
    text += f"Passes of the reference over the data: {result.reference_passes}."
    starts = [t.startup_seconds for t in result.trials if t.startup_seconds is not None]
    if starts:
        low, high = f"{min(starts):.1f}", f"{max(starts):.1f}"
        text += f" Start-up of a trial: {low if low == high else f'{low} to {high}'}\u00a0s."
    notes = [_reruns(result), runs_again_note((*result.trials, *result.reruns)), _kept_steps(result)]
    return " ".join([text, *filter(None, notes)])


def _reruns(result: SweepResult) -> str:
    """How often trials were run again, and what counts for them then; empty where none was."""
    if not result.reruns:
        return ""
    confirming = sum(run.purpose == "confirm" for run in result.reruns)
    kinds = {"to repeat trials": len(result.reruns) - confirming, "to confirm the best": confirming}
    told = ", ".join(f"{count} {what}" for what, count in kinds.items() if count)
    text = f"Beside these, runs with other seeds: {told}. Trials that were run again are shown by their means"
    return text + ("; of those that were confirmed only the confirming runs count." if confirming else ".")


def _kept_steps(result: SweepResult) -> str:
    """That trials are ranked by their best steps, and how these were chosen; empty where they are not."""
    kept = result.best.kept
    if kept is None:
        return ""
    return (
        f"Each trial kept its best step: {kept.choosing_pairs:,} of the validation pairs chose it, and the "
        f"other {kept.ranking_pairs:,} rank the trials, so that no trial gains by the choice. The best "
        f"trial's model is that of step {kept.step} of {result.best.total_steps or result.best.step}."
    )


def recommendation(result: SweepResult) -> Markup | None:
    """Which trial to take, and why; None where trials were not compared."""
    if len(result.comparisons) < 2:
        return None
    trial, reason = result.recommendation
    if trial is result.best:
        return Markup("<b>Recommended: the best one.</b> {}").format(reason)
    labels = parameter_labels(result)
    values = ", ".join(f"{labels[path]}\u00a0=\u00a0{format_value(v)}" for path, v in trial.overrides.items())
    return Markup("<b>Recommended: {}.</b> {}").format(values, reason)


def facts(result: SweepResult) -> dict[str, str]:
    """The numbers that people look for first, by name."""
    best, (saved, planned) = result.best, _saved_steps(result)
    measured = {
        f"{'best' if place == 0 else 'its'} {metric_label(metric)}": _value(result, best, metric)
        for place, metric in enumerate(shown_metrics(result))
        if best.is_ranked and metric in best.metrics
    }
    compared = result.comparisons
    if best.id in compared:
        measured[f"{result.confidence:.0%} interval"] = format_interval(compared[best.id].interval)
    if len(compared) > 1:
        level = sum(one.is_level for one in compared.values())
        measured["cannot be told apart"] = f"{level} of {len(compared)}"
    return measured | {
        "trials": str(len(result.trials)),
        "steps saved": f"{saved / planned:.0%}" if planned else "0%",
        "reference passes": str(result.reference_passes),
        "wall time": format_duration(result.seconds),
    }


def trials(result: SweepResult) -> tuple[list[tuple[str, str, str]], list[list[str]]]:
    """All trials, best first.

    Returns:
        Label, hint and kind of each column, as the template's table takes them, and the cells of each trial.
    """
    metrics, labels = shown_metrics(result), parameter_labels(result)
    if any("val/logratio/margin" in trial.metrics for trial in result.trials):
        metrics = list(dict.fromkeys([*metrics, "val/logratio/margin"]))
    compared, recommended = result.comparisons, result.recommended.id
    pareto = {trial.id for trial in result.frontier} if len(result.frontier_goals) > 1 else set()
    keeps = any(trial.kept is not None for trial in result.trials)

    def marks(trial: TrialRecord) -> str:
        is_level = len(compared) > 1 and trial.id in compared and compared[trial.id].is_level
        is_recommended = len(compared) > 1 and trial.id == recommended
        told = {" ◆": trial.id in pareto, " ≈": is_level, " ✓": is_recommended}
        return "".join(mark for mark, holds in told.items() if holds)

    def seeds(trial: TrialRecord) -> str:
        found = result.mean(trial)
        if found is None or found.error is None:
            return ""
        return f"± {format_number(found.error, 2)} ({found.runs})"

    def comparison_cells(trial: str) -> list[str]:
        one = compared.get(trial)
        if one is None:
            return [""] * 4
        told = format_interval(one.interval)
        if trial == result.best.id:
            return [told, "", "", ""]
        interval = " to ".join(map(format_difference, one.difference_interval))
        return [told, format_difference(one.difference), interval, format_p_value(one.p_value)]

    def cells(place: int, trial: TrialRecord) -> list[str]:
        measured = [result.value(trial, metric) for metric in metrics]
        return [
            str(place) if trial.is_ranked else "–",
            trial.id + marks(trial),
            *(format_value(trial.overrides[path]) if path in trial.overrides else "" for path in labels),
            *("" if value is None else format_number(value, 4, pad=True) for value in measured),
            *([seeds(trial)] if result.reruns else ()),
            *(comparison_cells(trial.id) if compared else ()),
            f"{trial.step:,} of {trial.total_steps:,}" if trial.total_steps else "0",
            *([f"{trial.model_step:,}"] if keeps else ()),
            trial.status
            + (f", {trial.starts} starts" if trial.starts > 1 else "")
            + (f", {trial.again:,} steps again" if trial.again else ""),
        ]

    columns = [
        *(("rank", "", ""), ("trial", "", "")),
        *((label, path, "") for path, label in labels.items()),
        *((metric_label(metric), metric, "right") for metric in metrics),
        *(
            [("over seeds", "Standard error of the mean, and how many runs it is of", "right")]
            if result.reruns
            else ()
        ),
        *(_comparison_columns(result) if compared else ()),
        ("steps", "", ""),
        *([("kept step", "Of the model; the metrics are those of this step", "right")] if keeps else ()),
        ("status", "", ""),
    ]
    return columns, [cells(place, trial) for place, trial in enumerate(result.trials, start=1)]


def _comparison_columns(result: SweepResult) -> list[tuple[str, str, str]]:
    """Label, hint and kind of the columns that compare a trial with the best one."""
    sure, units = f"{result.confidence:.0%} interval of the", result.objective.units
    return [
        ("interval", f"{sure} metric", "right"),
        ("difference", f"Paired difference from the best trial, on {result.objective.shared()}", "right"),
        ("its interval", f"{sure} difference", "right"),
        ("p", f"McNemar's test, or its like where {units} are not right or wrong", "right"),
    ]


def _value(result: SweepResult, trial: TrialRecord, metric: str) -> str:
    """A trial's last value, or the mean over seeds where it was run again."""
    found = result.mean(trial, metric)
    return "" if found is None else format_number(found.mean)


def trials_note(result: SweepResult) -> str:
    """What the marks in the table of trials mean."""
    text = "Best first."
    if result.reruns:
        text += " Metrics are means over the runs that count, with their standard error over seeds (runs)."
    if result.comparisons:
        text += f" Difference: from the best one, on {result.objective.shared()}."
    if len(result.frontier_goals) > 1:
        text += " ◆ belongs to the Pareto set."
    if len(result.comparisons) > 1:
        text += " ≈ cannot be told from the best one. ✓ is recommended."
    return text


def _saved_steps(result: SweepResult) -> tuple[int, int]:
    """Steps that stopping saved, and those that all trials would have taken."""
    planned = sum(max(t.total_steps, t.step) for t in result.trials)
    return sum(max(t.total_steps - t.step, 0) for t in result.trials if t.status == "stopped"), planned


def _scheduler(result: SweepResult) -> str:
    search: Any = result.settings.get("search")
    if isinstance(search, Mapping) and (search.get("init_args") or {}).get("pruner"):
        return "Optuna's pruner"
    given: Any = result.settings.get("scheduler", "the scheduler")
    return format_value(given.get("class_path", "the scheduler") if isinstance(given, Mapping) else given)
