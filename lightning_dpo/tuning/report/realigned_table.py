"""The members of a realigned family as a table, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_dpo.evaluation.kl import Estimate
from lightning_dpo.evaluation.realign import RealignedPoint
from lightning_dpo.tuning.report.formatting import format_number

__all__ = ["member_cells", "print_members"]


def print_members(points: Sequence[RealignedPoint]) -> None:
    """Print a line for each member; the table fits into 80 columns."""
    rows = Table()
    for name in member_cells(points[0]):
        rows.add_column(name, justify="right", no_wrap=True)
    for point in points:
        rows.add_row(*member_cells(point).values())
    Console().print(rows)


def member_cells(point: RealignedPoint) -> dict[str, str]:
    """What a table shows of a member, by the column's name."""
    cells = {
        "λ": f"{point.scale:g}",
        "accuracy": _with_error(point.pairs.accuracy),
        "margin": format_number(point.pairs.margin, pad=True),
    }
    if point.kl is None:
        cells["KL along the pairs"] = format_number(point.pairs.kl_on_pairs, pad=True)
    else:
        cells["KL"] = _with_error(point.kl)
    if point.score is not None:
        cells["score"] = _with_error(point.score)
    return cells


def _with_error(value: Estimate) -> str:
    return f"{format_number(value.mean, pad=True)} ± {format_number(value.standard_error, 2)}"
