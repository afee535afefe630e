from __future__ import annotations

import pytest
from sweep_results import made_up

from lightning_dpo.tuning.report.charts import draw_charts
from lightning_dpo.tuning.report.charts.importance import importance
from lightning_dpo.tuning.report.page import render
from lightning_dpo.tuning.results.importance import parameter_importance


def test_bars_and_the_text_beside_them_say_the_same() -> None:
    result = made_up("/sweeps/wide")
    found, chart = parameter_importance(result), importance(result)
    assert found is not None
    assert chart is not None
    (bars,) = chart.data
    assert bars["type"] == "bar"
    # Drawn from below: the most important one is the last.
    assert bars["x"] == pytest.approx(list(found.shares.values())[::-1])
    assert set(bars["y"]) == {"β", "lr", "loss"}
    for label, share in zip(bars["y"], bars["x"], strict=True):
        assert f"{label} {share:.0%}" in chart.note
    assert found.method in chart.note
    assert "label_smoothing" in chart.note
    assert f"the {found.trials} trials that finished" in chart.note


def test_the_page_has_it_and_a_sweep_of_few_trials_does_not() -> None:
    result = made_up("/sweeps/wide")
    titles = [chart.title for chart in draw_charts(result)]
    assert titles.index("Parameter importance") == titles.index("Accuracy over β and lr") + 1
    assert 'aria-label="Chart: Parameter importance. For accuracy: ' in render(result)
    few = made_up("/sweeps/few", trials=6, wide=False)
    assert "Parameter importance" not in [chart.title for chart in draw_charts(few)]
