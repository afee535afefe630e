"""The page of a realigned family: its table and its curve, beside the trials of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_dpo.evaluation.realign import RealignedPoint
from lightning_dpo.files import write_file
from lightning_dpo.tuning.report.charts.realignment import realignment
from lightning_dpo.tuning.report.page import fill_template
from lightning_dpo.tuning.report.realigned_table import member_cells
from lightning_dpo.tuning.results.result import SweepResult

__all__ = ["render_realignment", "write_realignment"]


def write_realignment(
    points: Sequence[RealignedPoint],
    path: str | Path,
    *,
    facts: Mapping[str, str],
    sweep: SweepResult | None = None,
) -> None:
    """Write the page of a family, see `render_realignment`."""
    write_file(Path(path), render_realignment(points, facts=facts, sweep=sweep))


def render_realignment(
    points: Sequence[RealignedPoint], *, facts: Mapping[str, str], sweep: SweepResult | None = None
) -> str:
    """The page as HTML that needs nothing else.

    Args:
        points: The members.
        facts: What it was measured on, by name.
        sweep: Whose trials to draw beside them.
    """
    drawn = [realignment(points, of=of, sweep=sweep) for of in ("score", "accuracy")]
    return fill_template(
        "realignment.html",
        charts=[chart for chart in drawn if chart is not None],
        facts=facts,
        columns=[(name, "", "right") for name in member_cells(points[0])],
        lines=[list(member_cells(point).values()) for point in points],
    )
