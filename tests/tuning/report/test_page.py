from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from sweep_results import ACCURACY, KL, made_up

from lightning_dpo.tuning.report.axes import axis, is_logarithmic, ticks
from lightning_dpo.tuning.report.charts import charts, hover_text
from lightning_dpo.tuning.report.labels import duration, number, path_names, value_text
from lightning_dpo.tuning.report.page import render
from lightning_dpo.tuning.report.parts import headline, lead
from lightning_dpo.tuning.results.result import SweepResult


@pytest.fixture(scope="module")
def result() -> SweepResult:
    return made_up("/sweeps/wide")


class TestWords:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.20174, "0.202"),
            (0.0406, "0.0406"),
            (3e-6, "3e-6"),
            (9.094e-6, "9.09e-6"),
            (2.5e-6, "2.5e-6"),
            (1240.4, "1240"),
            (0.0, "0"),
            (-0.00005, "-5e-5"),
            (123456.0, "1.23e5"),
        ],
    )
    def test_numbers(self, value: float, text: str) -> None:
        assert number(value) == text

    def test_numbers_of_a_column_keep_their_zeros(self) -> None:
        assert [number(value, 4, pad=True) for value in (0.767, 17.0, 11.46)] == ["0.7670", "17.00", "11.46"]

    def test_only_classes_lose_their_package(self) -> None:
        assert value_text("lightning_dpo.losses.IPOLoss") == "IPOLoss"
        assert value_text("data/pairs.v2.jsonl") == "data/pairs.v2.jsonl"
        assert value_text("pairs.jsonl") == "pairs.jsonl"
        assert value_text(True) == "True"
        assert value_text({"a": 1}) == '{"a": 1}'

    def test_paths_are_short_unless_two_would_be_the_same(self) -> None:
        assert path_names(["model.loss.beta", "model.loss.class_path", "model.optimizer.lr"]) == {
            "model.loss.beta": "β",
            "model.loss.class_path": "loss",
            "model.optimizer.lr": "lr",
        }
        assert path_names(["a.size", "b.size"]) == {"a.size": "a.size", "b.size": "b.size"}

    def test_durations(self) -> None:
        assert [duration(value) for value in (46.2, 720, 11100)] == ["46 s", "12 min", "3 h 05 min"]


class TestAxes:
    def test_ticks_are_round(self) -> None:
        assert ticks(0.01, 0.5) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
        assert ticks(1e-6, 1e-3) == pytest.approx([1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3])
        assert ticks(1e-6, 1) == pytest.approx([10.0**power for power in range(-6, 1)])

    def test_the_ticks_say_what_they_are(self) -> None:
        texts = ["1e-6", "2e-6", "5e-6", "1e-5", "2e-5", "5e-5", "1e-4"]
        assert axis("lr", [1e-6, 1e-4], margin=0)["ticktext"] == texts

    def test_values_that_are_not_positive_stay_linear(self) -> None:
        assert is_logarithmic([0.001, 1])
        assert not is_logarithmic([0.0, 1])
        assert not is_logarithmic([1.0, 2.0])
        assert "type" not in axis("steps", [])


class TestCharts:
    def test_the_pareto_set_is_joined(self, result: SweepResult) -> None:
        pareto = next(trace for trace in charts(result)[0].data if trace["name"] == "Pareto set")
        assert len(pareto["x"]) == len(result.frontier) > 2
        assert pareto["x"] == sorted(pareto["x"])
        assert pareto["y"] == sorted(pareto["y"])
        assert "lines" in pareto["mode"]

    def test_every_ranked_trial_is_a_point(self, result: SweepResult) -> None:
        chart = charts(result)[0]
        points = sum(len(trace["x"]) for trace in chart.data if trace["name"] != "best")
        assert points == sum(trial.is_ranked for trial in result.trials)
        assert "5 that went wrong are not shown" in chart.note

    def test_parallel_coordinates_hold_choices_and_what_some_trials_lack(self, result: SweepResult) -> None:
        chart = next(chart for chart in charts(result) if chart.title == "Parallel coordinates")
        by_label = {dimension["label"]: dimension for dimension in chart.data[0]["dimensions"]}
        assert list(by_label)[:2] == ["β", "lr"]
        assert by_label["loss"]["ticktext"] == ["DPOLoss", "IPOLoss", "KTOLoss"]
        assert "–" in by_label["label_smoothing"]["ticktext"]
        ranked = sum(trial.is_ranked for trial in result.trials)
        assert all(len(dimension["values"]) == ranked for dimension in by_label.values())

    def test_what_is_shown_on_hover(self, result: SweepResult) -> None:
        trial = result.best
        lines = hover_text(trial, result).split("<br>")
        assert lines[0] == f"<b>trial {trial.id}</b>"
        assert len(lines) == 1 + len(trial.overrides) + 3
        assert lines[-1] == "step 320 of 320, finished"

    def test_few_trials_and_one_goal(self) -> None:
        small = made_up("/sweeps/one", trials=1, kl=False, wide=False)
        assert [chart.title for chart in charts(small)] == ["Learning curves", "Steps run and saved"]
        assert KL not in render(small)


class TestPage:
    def test_a_sweep_where_all_went_wrong(self, result: SweepResult) -> None:
        wrong = tuple(trial for trial in result.trials if not trial.is_ranked)
        lost = replace(result, trials=wrong, recipe="")
        assert headline(lost) == "Every trial went wrong"
        assert [chart.title for chart in charts(lost)] == ["Learning curves", "Steps run and saved"]
        assert "not finite at step 40" in render(lost)

    def test_the_headline_says_what_won(self) -> None:
        small = made_up("/sweeps/small", trials=8, wide=False)
        best = small.best
        text = re.sub("<.*?>", "", headline(small)).replace("\u00a0", " ")
        assert text == (
            f"β = {number(best.overrides['model.loss.beta'])}, "
            f"lr = {number(best.overrides['model.optimizer.lr'])} reached "
            f"accuracy {number(best.metrics[ACCURACY])} at KL {number(best.metrics[KL])}"
        )

    def test_the_lead_counts(self, result: SweepResult) -> None:
        stopped = [trial for trial in result.trials if trial.status == "stopped"]
        saved = sum(trial.total_steps - trial.step for trial in stopped)
        text = lead(result)
        assert f"{len(stopped)} stopped early by asha, 5 went wrong" in text
        assert f"saved {saved:,} of " in text
        assert "reference over the data: 1." in text

    def test_what_a_trial_says_cannot_become_markup(self, result: SweepResult) -> None:
        text = render(result)
        assert "<script>alert" not in text
        assert "&lt;script&gt;alert" in text
        found = re.search(r'id="charts">(.*?)</script>', text, re.DOTALL)
        assert found
        assert len(json.loads(found[1])) == 5

    def test_the_files_of_the_page_are_packaged(self) -> None:
        settings = (Path(__file__).parents[3] / "pyproject.toml").read_text()
        assert '"tuning/report/*.css", "tuning/report/*.js"' in settings
