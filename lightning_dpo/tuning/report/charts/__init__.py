"""The charts of a report, as plotly figures in plain JSON values.

They are drawn here although `optuna.visualization` has some of them: those need an Optuna study, which a
grid or a sweep's saved folder does not have, do not tell how a trial ended or how sure its KL is, and would
not follow the page between light and dark.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_dpo.tuning.report.charts.chart import Chart
from lightning_dpo.tuning.report.charts.differences import differences
from lightning_dpo.tuning.report.charts.heat_map import heat_map
from lightning_dpo.tuning.report.charts.importance import importance
from lightning_dpo.tuning.report.charts.learning_curves import learning_curves
from lightning_dpo.tuning.report.charts.moved_mass import moved_mass
from lightning_dpo.tuning.report.charts.parallel_coordinates import parallel_coordinates
from lightning_dpo.tuning.report.charts.steps_run import steps_run
from lightning_dpo.tuning.report.charts.trade_off import trade_off
from lightning_dpo.tuning.results.result import SweepResult

__all__ = ["Chart", "draw_charts"]

_CHARTS: tuple[Callable[[SweepResult], Chart | None], ...] = (
    trade_off,
    differences,
    moved_mass,
    heat_map,
    importance,
    learning_curves,
    parallel_coordinates,
    steps_run,
)
"""All charts in the order of the page; one returns None where the sweep has no data for it."""


def draw_charts(result: SweepResult) -> list[Chart]:
    """All charts that the sweep has data for."""
    return [chart for chart in (draw(result) for draw in _CHARTS) if chart is not None]
