from __future__ import annotations

import cProfile
import json
import math
import pstats
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from sweep_results import ACCURACY, KL, made_up

from lightning_dpo.tuning import report
from lightning_dpo.tuning.report.charts import draw_charts
from lightning_dpo.tuning.report.formatting import format_number
from lightning_dpo.tuning.report.page import render
from lightning_dpo.tuning.report.sections import headline, lead
from lightning_dpo.tuning.report.summary import print_summary
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.trial.record import TrialRecord


@pytest.fixture(scope="module")
def result() -> SweepResult:
    return made_up("/sweeps/wide")


def test_a_sweep_where_all_went_wrong(result: SweepResult) -> None:
    wrong = tuple(trial for trial in result.trials if not trial.is_ranked)
    lost = replace(result, trials=wrong, recipe="")
    assert headline(lost) == "Every trial went wrong"
    assert [chart.title for chart in draw_charts(lost)] == ["Learning curves", "Steps run and saved"]
    assert "not finite at step 40" in render(lost)


def test_the_headline_says_what_won() -> None:
    small = made_up("/sweeps/small", trials=8, wide=False)
    best = small.best
    text = re.sub("<.*?>", "", headline(small)).replace("\u00a0", " ")
    assert text == (
        f"β = {format_number(best.overrides['model.loss.beta'])}, "
        f"lr = {format_number(best.overrides['model.optimizer.lr'])} reached "
        f"accuracy {format_number(best.metrics[ACCURACY])} at KL {format_number(best.metrics[KL])}"
    )


def test_the_lead_counts(result: SweepResult) -> None:
    stopped = [trial for trial in result.trials if trial.status == "stopped"]
    saved = sum(trial.total_steps - trial.step for trial in stopped)
    text = lead(result)
    assert f"{len(stopped)} stopped early by asha, 5 went wrong" in text
    assert f"saved {saved:,} of " in text
    assert "reference over the data: 1." in text


def test_what_a_trial_says_cannot_become_markup(result: SweepResult) -> None:
    text = render(result)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    found = re.search(r'id="charts">(.*?)</script>', text, re.DOTALL)
    assert found
    assert len(json.loads(found[1])) == 6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_no_number_takes_no_chart_with_it(value: float) -> None:
    whole = made_up("/sweeps/small", trials=8, wide=False)
    history = ({**whole.trials[2].history[-1], KL: value, "val/logratio/chosen": value},)
    broken = replace(whole.trials[2], history=history)
    text = render(replace(whole, trials=(*whole.trials[:2], broken, *whole.trials[3:])))
    found = re.search(r'id="charts">(.*?)</script>', text, re.DOTALL)
    assert found

    def refuse(name: str) -> None:
        raise AssertionError(f"a browser does not read {name}")

    assert len(json.loads(found[1], parse_constant=refuse)) == 5


def test_runs_with_other_seeds_that_went_wrong_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    whole = made_up("/sweeps/small", trials=8, wide=False)
    again = TrialRecord(
        "r1", {}, "diverged", "the loss is not finite", rerun_of=whole.best.id, purpose="confirm"
    )
    text = render(replace(whole, reruns=(again,)))
    assert f"trial r1, a run of {whole.best.id} with another seed" in text
    print_summary(replace(whole, reruns=(again,)))
    assert "diverged: the loss is not finite (1 run with another seed)" in capsys.readouterr().out


def test_the_files_of_the_page_are_packaged() -> None:
    root = Path(__file__).parents[3]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["lightning_dpo"]
    packaged = {path for pattern in patterns for path in (root / "lightning_dpo").glob(pattern)}
    files = {path for path in Path(report.__path__[0]).rglob("*") if path.is_file()}
    others = {path for path in files if path.suffix not in (".py", ".pyc")}
    pages = {"base.html", "page.html", "frontier.html", "realignment.html"}
    assert {path.name for path in others} == {*pages, "macros.html", "report.css", "report.js"}
    assert others <= packaged


def test_the_work_of_a_report_grows_with_its_trials(tmp_path: Path) -> None:
    def calls(trials: int) -> int:
        result = made_up(str(tmp_path), trials=trials)
        with cProfile.Profile() as profile:
            render(result)
        return int(pstats.Stats(profile).total_calls)

    calls(20)  # what is done once
    assert calls(400) < 2.5 * calls(200)
