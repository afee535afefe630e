"""The table in the terminal of trials that cannot be told from the best one, at the end of a sweep."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_dpo.tuning.objective import KL
from lightning_dpo.tuning.report.formatting import format_number, format_value, metric_label, path_labels
from lightning_dpo.tuning.results.result import SweepResult

__all__ = ["comparison_table", "format_difference", "format_interval", "format_p_value"]

_MOST = 12
_PATHS = 2


def comparison_table(result: SweepResult) -> Table | None:
    """The best trial and those that cannot be told from it, best first; None where there are none.

    Two parameters are shown, beta and the rate where they vary: all of them are in the report.

    Args:
        result: A sweep that has ended.
    """
    compared = result.comparisons
    level = [trial for trial in result.trials if trial.id in compared and compared[trial.id].is_level]
    if len(level) < 2:
        return None
    shown = level[:_MOST]
    if result.recommended not in shown:
        shown = [*shown[:-1], result.recommended]
    paths = sorted(
        {path: None for trial in level for path in trial.overrides},
        key=lambda path: (not path.endswith(".beta"), not path.endswith(".lr")),
    )[:_PATHS]
    label = metric_label(result.objective.primary.metric)
    table = Table(
        title=f"{len(level)} trials that cannot be told apart, of {len(compared)} ({result.confidence:.0%} "
        f"confidence, {compared[level[0].id].pairs:,} {result.objective.units})",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("trial", no_wrap=True)
    names = path_labels(paths)
    for path in paths:
        table.add_column(names[path], no_wrap=True, max_width=10)
    for name in (label, "interval", "less", "p", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in shown:
        one = compared[trial.id]
        mark = " ✓" if trial is result.recommended else ""
        table.add_row(
            trial.id[-5:] + mark,
            *(Text(format_value(trial.overrides.get(path, ""))) for path in paths),
            format_number(one.mean, pad=True),
            format_interval(one.interval),
            "" if trial is result.best else format_difference(one.difference),
            "" if trial is result.best else format_p_value(one.p_value),
            "" if (kl := result.value(trial, KL)) is None else format_number(kl),
            style="bold" if trial is result.recommended else "",
        )
    left_out = len(level) - len(shown)
    table.caption = "✓ recommended" + (f"; {left_out} more in the report" if left_out else "")
    return table


def format_interval(interval: tuple[float, float]) -> str:
    """An interval as 0.676–0.761; ends that may be negative stand apart."""
    low, high = (format_number(end, pad=True) for end in interval)
    return f"{low}–{high}" if min(interval) >= 0 else f"{low} to {high}"


def format_difference(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.3f}"


def format_p_value(value: float) -> str:
    """A p-value: two digits, and nothing below a thousandth."""
    return "<0.001" if value < 0.001 else f"{value:.2g}"
