from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from sweep_results import KL, made_up

from lightning_dpo.tuning.report.charts import draw_charts
from lightning_dpo.tuning.report.charts.chart import hover_text
from lightning_dpo.tuning.report.page import render
from lightning_dpo.tuning.results.result import SweepResult


@pytest.fixture(scope="module")
def result() -> SweepResult:
    return made_up("/sweeps/wide")


def test_the_pareto_set_is_joined(result: SweepResult) -> None:
    pareto = next(trace for trace in draw_charts(result)[0].data if trace["name"] == "Pareto set")
    assert len(pareto["x"]) == len(result.frontier) > 2
    assert pareto["x"] == sorted(pareto["x"])
    assert pareto["y"] == sorted(pareto["y"])
    assert "lines" in pareto["mode"]


def test_every_ranked_trial_is_a_point(result: SweepResult) -> None:
    chart = draw_charts(result)[0]
    points = sum(len(trace["x"]) for trace in chart.data if trace["name"] not in ("best", "recommended"))
    assert points == sum(trial.is_ranked for trial in result.trials)
    assert "5 that went wrong are not shown" in chart.note


def test_parallel_coordinates_hold_choices_and_what_some_trials_lack(result: SweepResult) -> None:
    chart = next(chart for chart in draw_charts(result) if chart.title == "Parallel coordinates")
    by_label = {dimension["label"]: dimension for dimension in chart.data[0]["dimensions"]}
    assert list(by_label)[:2] == ["β", "lr"]
    assert by_label["loss"]["ticktext"] == ["DPOLoss", "IPOLoss", "KTOLoss"]
    assert "–" in by_label["label_smoothing"]["ticktext"]
    ranked = sum(trial.is_ranked for trial in result.trials)
    assert all(len(dimension["values"]) == ranked for dimension in by_label.values())


def test_labels_of_an_axis_do_not_cover_each_other() -> None:
    few = made_up("/sweeps/few", trials=4, wide=False)
    values = (0.7588, 0.7559, 0.7402, 0.6289)
    close = [
        replace(trial, history=({**trial.metrics, "val/rewards/accuracy": value},))
        for trial, value in zip(few.trials, values, strict=True)
    ]
    charts = draw_charts(replace(few, trials=tuple(close)))
    chart = next(chart for chart in charts if chart.title == "Parallel coordinates")
    dimension = next(one for one in chart.data[0]["dimensions"] if one["label"] == "accuracy")
    labelled = [tick for tick, text in zip(dimension["tickvals"], dimension["ticktext"], strict=True) if text]
    assert len(labelled) > 1
    assert min(after - tick for tick, after in pairwise(labelled)) > 0.06 * (0.7588 - 0.6289)


def test_a_trial_on_the_map_has_its_own_colour(result: SweepResult) -> None:
    chart = next(chart for chart in draw_charts(result) if chart.title == "Accuracy over β and lr")
    heat, rings, cores = chart.data[:3]
    others = [trial for trial in result.trials if trial.is_ranked and trial is not result.best]
    assert len(rings["x"]) == len(others)
    assert cores["marker"]["color"] == [trial.metrics["val/rewards/accuracy"] for trial in others]
    assert (cores["marker"]["cmin"], cores["marker"]["cmax"]) == (heat["zmin"], heat["zmax"])


def test_where_the_probability_went(result: SweepResult) -> None:
    assert "Where the probability went" not in [chart.title for chart in draw_charts(result)]
    ends = ({"val/logratio/chosen": -2.0, "val/logratio/rejected": -9.0}, {"val/logratio/chosen": 1.0})
    moved = [
        replace(trial, history=(*trial.history[:-1], {**trial.history[-1], **end}))
        for trial, end in zip(result.trials, ends, strict=False)
    ]
    charts = draw_charts(replace(result, trials=(*moved, *result.trials[2:])))
    chart = next(chart for chart in charts if chart.title == "Where the probability went")
    assert [(trace["x"], trace["y"]) for trace in chart.data] == [([-2.0], [-9.0])]
    assert "in 1 of 1 trials: a larger β, DPOPLoss" in chart.note


def test_what_is_shown_on_hover(result: SweepResult) -> None:
    trial = result.best
    lines = hover_text(trial, result).split("<br>")
    assert lines[0] == f"<b>trial {trial.id}</b>"
    assert len(lines) == 1 + len(trial.overrides) + 3
    assert lines[-1] == "step 320 of 320, finished"


def test_what_a_trial_says_is_text_on_hover(result: SweepResult) -> None:
    values = {"model.<i>x</i>": "<img src=x>"}
    trial = replace(result.trials[-1], overrides=values, status="failed", reason="<b>one's own</b> & more")
    hovers = [
        text
        for chart in draw_charts(replace(result, trials=(*result.trials[:2], trial)))
        for trace in chart.data
        for text in trace.get("text", ())
    ]
    of_trial = [text for text in hovers if f"trial {trial.id}" in text]
    assert of_trial
    for text in of_trial:
        assert re.sub("</?b>|<br>", "", text).count("<") == 0
        assert "&lt;i&gt;x&lt;/i&gt; = &lt;img src=x&gt;" in text
    assert "&lt;b&gt;one&#39;s own&lt;/b&gt; &amp; more" in hovers[-1]


def test_few_trials_and_one_goal() -> None:
    small = made_up("/sweeps/one", trials=1, kl=False, wide=False)
    assert [chart.title for chart in draw_charts(small)] == ["Learning curves", "Steps run and saved"]
    assert KL not in render(small)
