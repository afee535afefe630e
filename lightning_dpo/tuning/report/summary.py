"""A sweep in a few words: the names of its parameters, its counts, and the last lines in the terminal."""

from __future__ import annotations

from collections import Counter

from rich.console import Console

from lightning_dpo.tuning.report.formatting import format_number, format_value, metric_label, path_labels
from lightning_dpo.tuning.results.result import KL, SweepResult

__all__ = ["parameter_labels", "print_summary", "shown_metrics", "status_counts"]


def parameter_labels(result: SweepResult) -> dict[str, str]:
    """The label of each config path that a trial of the sweep set."""
    return path_labels(path for trial in result.trials for path in trial.overrides)


def shown_metrics(result: SweepResult) -> list[str]:
    """The metrics of the frontier's goals, and the KL where it was measured."""
    measured = [KL] if any(KL in trial.metrics for trial in result.trials) else []
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
    measured = ", ".join(
        f"{metric_label(metric)} {format_number(best.metrics[metric], 4)}" for metric in goals
    )
    trials = ", ".join(f"{count} {status}" for status, count in status_counts(result).items())
    lines = [
        f"best: {measured} with {values}",
        f"trials: {len(result.trials)} ({trials}) in {result.seconds:.0f} s",
        f"reference passes: {result.reference_passes}",
        f"recipe: {result.location}/best/config.yaml",
        *([f"model: {result.model}"] if result.model else []),
        f"report: {result.report_path}",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
