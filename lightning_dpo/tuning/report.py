"""The report of a sweep: one HTML file that needs nothing else."""

from __future__ import annotations

from lightning_dpo.tuning.results import SweepResult

__all__ = ["write_report"]


def write_report(result: SweepResult) -> None:
    """Write `report.html` into the sweep's folder."""
