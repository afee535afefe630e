"""How the report and the terminal show which trials cannot be told from the best one."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console
from sweep_results import ACCURACY, KL, compared, made_up

from lightning_dpo.tuning.report import summary
from lightning_dpo.tuning.report.charts import draw_charts
from lightning_dpo.tuning.report.comparison_table import comparison_table, format_interval
from lightning_dpo.tuning.report.page import render
from lightning_dpo.tuning.results.result import SweepResult, TrialRecord


@pytest.fixture(scope="module")
def result() -> SweepResult:
    return compared(made_up("/sweeps/wide"))


def test_the_terminal_shows_the_trials_that_cannot_be_told_apart(result: SweepResult) -> None:
    level = [name for name, one in result.comparisons.items() if one.is_level]
    assert 2 < len(level) < len(result.comparisons)
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(comparison_table(result))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.strip().startswith("000")]
    assert len(rows) == min(len(level), 12)
    assert rows[0][0] == result.best.id[-5:]
    assert [row[0] for row in rows if row[1] == "✓"] == [result.recommended.id[-5:]]
    assert not any("…" in line for line in lines)


def test_there_is_no_table_without_comparisons(result: SweepResult) -> None:
    assert comparison_table(made_up("/sweeps/x")) is None
    alone = {result.best.id: result.comparisons[result.best.id]}
    assert comparison_table(replace(result, comparisons=alone)) is None


def test_the_page_says_which_one_to_take_and_why(result: SweepResult) -> None:
    page = render(replace(result, recommended_recipe="model: recommended"))
    text = re.sub("<.*?>", "", page[page.index("<header>") : page.index("</header>")])
    assert "Recommended: " in text
    assert "has the lowest KL" in text
    assert f"{sum(one.is_level for one in result.comparisons.values())} of {len(result.comparisons)}" in text
    assert "The recommended recipe" in page
    row = next(line for line in page.splitlines() if line.startswith(f"<td>{result.recommended.id} "))
    assert "≈" in row
    assert "✓" in row
    assert ">difference<" in page


def test_the_chart_shows_every_difference_with_its_interval(result: SweepResult) -> None:
    chart = next(one for one in draw_charts(result) if one.title.startswith("Which trials"))
    shown = {trace["name"]: trace for trace in chart.data}
    assert list(shown) == ["best", "recommended", "cannot be told from the best", "can be told from it"]
    one = result.comparisons[result.recommended.id]
    bars = shown["recommended"]["error_x"]
    assert shown["recommended"]["x"] == [one.difference]
    assert one.difference - bars["arrayminus"][0] == pytest.approx(one.difference_interval.low)
    assert one.difference + bars["array"][0] == pytest.approx(one.difference_interval.high)


def test_the_last_lines_name_the_recommended_trial(
    result: SweepResult, capsys: pytest.CaptureFixture[str]
) -> None:
    summary.print_summary(result)
    shown = capsys.readouterr().out
    assert "recommended: " in shown
    assert "recommended/config.yaml" in shown
    assert "(95%: " in shown


def test_intervals_as_text() -> None:
    assert format_interval((0.676, 0.7614)) == "0.676–0.761"
    assert format_interval((-0.5, 0.25)) == "-0.500 to 0.250"


def run_again(result: SweepResult, trial: TrialRecord, *values: dict[str, float]) -> SweepResult:
    """The sweep, with runs that confirmed a trial."""
    again = [
        replace(
            trial,
            id=f"again{number}",
            status="finished",
            rerun_of=trial.id,
            purpose="confirm",
            history=({**trial.metrics, **value},),
        )
        for number, value in enumerate(values)
    ]
    return replace(result, reruns=tuple(again))


def test_means_over_seeds_are_shown_with_their_error(result: SweepResult) -> None:
    page = render(run_again(result, result.best, {ACCURACY: 0.70}, {ACCURACY: 0.72}))
    assert ">over seeds<" in page
    assert '<td class="right">0.7100</td>' in page
    assert '<td class="right">± 0.01 (2)</td>' in page
    headline = page[page.index("<h1>") : page.index("</h1>")]
    assert "accuracy\u00a00.71" in headline
    assert "(mean of 2\u00a0seeds)" in headline
    assert "runs with other seeds: 2 to confirm the best." in page
    assert "variance between seeds" in page


def test_all_of_the_page_shows_a_trial_by_its_mean(result: SweepResult) -> None:
    again = run_again(result, result.best, {ACCURACY: 0.70, KL: 3.0}, {ACCURACY: 0.72, KL: 5.0})
    charts = {chart.title: chart for chart in draw_charts(again)}
    star = next(trace for trace in charts["Accuracy against KL"].data if trace["name"] == "best")
    assert star["x"] == [4.0]
    assert star["y"] == [pytest.approx(0.71)]
    assert "accuracy 0.71 ± 0.01 (mean of 2 seeds)" in star["text"][0]
    lines = charts["Parallel coordinates"].data[0]
    assert lines["line"]["color"][0] == pytest.approx(0.71)
    assert "and not 4, " in again.recommendation.reason


def test_the_recommended_trial_is_ringed_where_it_is_weighed(result: SweepResult) -> None:
    chart = draw_charts(result)[0]
    ring = next(trace for trace in chart.data if trace["name"] == "recommended")
    assert ring["x"] == [result.recommended.metrics[KL]]
    assert ring["y"] == [result.recommended.metrics[ACCURACY]]
    alone = draw_charts(replace(result, comparisons={}))[0]
    assert "recommended" not in [trace["name"] for trace in alone.data]
