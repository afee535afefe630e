"""The comparison as a table on the terminal, and what its cells say."""

from __future__ import annotations

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_dpo.evaluation import FrontierPoint
from lightning_dpo.tuning.frontier.intervals import Interval
from lightning_dpo.tuning.frontier.result import FrontierResult, MethodShares
from lightning_dpo.tuning.report.formatting import format_duration, format_number

__all__ = ["NOTE", "best_text", "print_result", "share_text", "to_markdown"]

NOTE = (
    "Share of the reward that can be gained at this KL, %, read off each seed's curve, with a 95 % interval "
    "over the seeds. Empty: no curve of the method reaches this KL on both sides, or the best is not known "
    "there. *: not every seed's curve does."
)
"""How the table is read."""


def share_text(share: Interval | None, *, seeds: int) -> str:
    """A share of the limit with its interval, in percent."""
    if share is None:
        return ""
    width = "" if math.isnan(share.half_width) else f" ± {100 * share.half_width:.0f}"
    return f"{100 * share.mean:.0f}{width}" + ("*" if share.values < seeds else "")


def best_text(point: FrontierPoint) -> str:
    """The best reward at a KL; with a tilde where too few samples tell."""
    return ("" if point.is_reliable else "~") + format_number(point.reward)


def to_markdown(result: FrontierResult) -> str:
    """The table as Markdown, for a project's own documents."""
    head = ["method", *(f"KL {kl:g}" for kl in result.kls), "furthest"]
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    lines.append(["best reward", *(best_text(point) for point in result.best_at()), ""])
    lines += [_cells(compared, seeds=result.seeds) for compared in result.compare()]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{table}\n\n{NOTE}\n"


def print_result(result: FrontierResult, *, console: Console | None = None) -> None:
    """Print the table, what went wrong, and where everything is.

    Args:
        result: The comparison.
        console: Standard output by default.
    """
    out = console or Console()
    out.print(_table(result))
    for failure in result.failures:
        reason = failure.reason.splitlines()[0]
        out.print(f"went wrong: {escape(failure.method)}, {escape(failure.what)}: {escape(reason)}")
    runs = f"{len(result.points)} policies of {len(result.methods)} methods"
    lines = (
        f"{runs} in {format_duration(result.seconds)}",
        f"table: {result.location}/frontier.parquet",
        f"page: {result.report_path}",
    )
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(result: FrontierResult) -> Table:
    table = Table(title="Reward at equal KL", title_justify="left", caption=NOTE, caption_justify="left")
    table.add_column("method")
    for kl in result.kls:
        table.add_column(f"KL {kl:g}", justify="right", no_wrap=True)
    table.add_column("furthest", justify="right", no_wrap=True)
    best = (best_text(point) for point in result.best_at())
    table.add_row("best reward", *best, "", end_section=True)
    for compared in result.compare():
        table.add_row(*map(escape, _cells(compared, seeds=result.seeds)))
    return table


def _cells(compared: MethodShares, *, seeds: int) -> list[str]:
    shares = (share_text(share, seeds=seeds) for share in compared.shares)
    return [compared.method, *shares, f"KL {compared.furthest:.1f}"]
