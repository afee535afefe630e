"""The chart and the page of a realigned family."""

from __future__ import annotations

import json
import re

import pytest
from sweep_results import ACCURACY, KL, made_up

from lightning_dpo.evaluation import Estimate
from lightning_dpo.evaluation.realign import MemberOnPairs, RealignedPoint
from lightning_dpo.tuning.report.charts.realignment import realignment
from lightning_dpo.tuning.report.realigned_table import print_members
from lightning_dpo.tuning.report.realignment import render_realignment

SCALES = (2.0, 0.5, 1.0)


def point(scale: float, *, sampled: bool = True, judged: bool = True) -> RealignedPoint:
    pairs = MemberOnPairs(
        scale, Estimate(0.5 + scale / 10, 0.012345), -40.0, -50.0, 12.3456 * scale, 1.5 * scale
    )
    kl, score = Estimate(4 * scale, 0.23), Estimate(3.0 + scale, 0.05)
    return RealignedPoint(pairs, kl if sampled else None, score if judged else None)


def test_members_are_joined_in_the_order_of_lambda_beside_the_trials() -> None:
    sweep = made_up("/sweep")
    chart = realignment([point(scale) for scale in SCALES], sweep=sweep)
    assert chart is not None
    trials, family = chart.data
    assert family["x"] == [2.0, 4.0, 8.0]
    assert family["y"] == [0.55, 0.6, 0.7]
    assert family["text"] == ["λ 0.5", "λ 1", "λ 2"]
    assert family["error_x"]["array"] == [0.23] * 3
    shown = [trial for trial in sweep.trials if trial.is_ranked]
    assert trials["x"] == [trial.metrics[KL] for trial in shown]
    assert trials["y"] == [trial.metrics[ACCURACY] for trial in shown]
    assert chart.title == "Accuracy against KL"


def test_what_was_not_measured_is_not_drawn() -> None:
    assert realignment([point(scale, judged=False) for scale in SCALES], of="score") is None
    chart = realignment([point(scale, sampled=False) for scale in SCALES], sweep=made_up("/sweep"))
    assert chart is not None
    (family,) = chart.data  # trials have another KL
    assert family["x"] == [0.75, 1.5, 3.0]
    assert chart.title == "Accuracy against KL along the pairs"


def test_the_page_has_both_charts_and_the_table() -> None:
    text = render_realignment([point(scale) for scale in SCALES], facts={"checkpoint": "<last>.ckpt"})
    assert "&lt;last&gt;.ckpt" in text
    found = re.search(r'id="charts">(.*?)</script>', text, re.DOTALL)
    assert found
    assert len(json.loads(found[1])) == 2
    assert "Score against KL" in text
    assert text.count("<tr") == 1 + len(SCALES)


@pytest.mark.parametrize("judged", [True, False])
def test_the_table_fits_a_terminal(
    judged: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_members([point(scale, judged=judged) for scale in (0.25, 1234.5)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert ("score" in lines[1]) == judged
    assert "0.525 ± 0.012" in lines[3]
