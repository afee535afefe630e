"""A sweep in a few words: the names of its parameters, its counts, and the last lines in the terminal."""

from __future__ import annotations

from collections import Counter

from rich.console import Console

from lightning_dpo.tuning.objective import KL
from lightning_dpo.tuning.report.comparison_table import comparison_table, format_interval
from lightning_dpo.tuning.report.formatting import (
    format_number,
    format_value,
    metric_label,
    one_line,
    path_labels,
)
from lightning_dpo.tuning.results.kept import kept_step_note, runs_again_note
from lightning_dpo.tuning.results.result import SweepResult

__all__ = ["parameter_labels", "print_summary", "shown_metrics", "status_counts"]


def parameter_labels(result: SweepResult) -> dict[str, str]:
    """The label of each config path that a trial of the sweep set."""
    return path_labels(result.paths)


def shown_metrics(result: SweepResult) -> list[str]:
    """The metrics of the frontier's goals, and the KL and what a judge said where these were measured."""
    measured = [*result.judged, *([KL] if result.measures_kl else [])]
    return list(dict.fromkeys([*(goal.metric for goal in result.frontier_goals), *measured]))


def status_counts(result: SweepResult) -> Counter[str]:
    """How many trials ended in each way, in the order of the ranking."""
    return Counter(str(trial.status) for trial in result.trials)


def print_summary(result: SweepResult) -> None:
    """Print the last lines of a sweep: what won, how the trials ended, and where everything is."""
    console = Console()
    best = result.best
    labels = path_labels(best.overrides)
    values = ", ".join(f"{labels[path]} {format_value(value)}" for path, value in best.overrides.items())
    goals = [goal.metric for goal in result.frontier_goals if goal.metric in best.metrics]
    measured = ", ".join(f"{metric_label(metric)} {_measured(result, metric)}" for metric in goals)
    table = comparison_table(result)
    if table is not None:
        console.print(table)
    trials = ", ".join(f"{count} {status}" for status, count in status_counts(result).items())
    lines = [
        f"best: {measured} with {values}",
        *filter(None, [kept_step_note(best)]),
        *_recommended(result),
        f"trials: {len(result.trials)} ({trials}) in {result.seconds:.0f} s",
        *_went_wrong(result),
        *filter(None, [runs_again_note((*result.trials, *result.reruns))]),
        f"reference passes: {result.reference_passes}",
        f"recipe: {result.location}/best/config.yaml",
        *([f"model: {result.model}"] if result.model else []),
        f"report: {result.report_path}",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _measured(result: SweepResult, metric: str) -> str:
    """The best trial's value, or its mean where it was run again; of the first goal with its interval."""
    best, found = result.best, result.mean(result.best, metric)
    assert found is not None  # metrics that the trial does not have are not shown
    text = format_number(found.mean, 4)
    if found.runs > 1:
        text += f" (mean of {found.runs} seeds)"
    if metric == result.objective.primary.metric and best.id in result.comparisons:
        text += f" ({result.confidence:.0%}: {format_interval(result.comparisons[best.id].interval)})"
    return text


def _went_wrong(result: SweepResult) -> list[str]:
    """Why trials went wrong, each reason once: the most frequent ones; the report has all of them."""
    lines = []
    again = ("run with another seed", "runs with other seeds")
    for runs, (one, many) in ((result.trials, ("trial", "trials")), (result.reruns, again)):
        reasons = Counter(f"{t.status}: {t.reason}" for t in runs if t.status.went_wrong and t.reason)
        lines += [
            f"{one_line(reason)} ({count} {one if count == 1 else many})"
            for reason, count in reasons.most_common(3)
        ]
    return lines


def _recommended(result: SweepResult) -> list[str]:
    """Which trial to take and why, where trials were compared; and where its files are, if it has its own."""
    if len(result.comparisons) < 2:
        return []
    trial, reason = result.recommendation
    if trial is result.best:
        return [f"recommended: the best one. {reason}"]
    labels = path_labels(trial.overrides)
    values = ", ".join(f"{labels[path]} {format_value(value)}" for path, value in trial.overrides.items())
    return [
        f"recommended: {values}. {reason}",
        f"its recipe: {result.location}/recommended/config.yaml",
        *([f"its model: {result.recommended_model}"] if result.recommended_model else []),
    ]
