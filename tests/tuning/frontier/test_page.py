from __future__ import annotations

import dataclasses
import io
import json
import re
from typing import Any

import pytest
from frontier_results import KLS, limit, made_up
from rich.console import Console

from lightning_dpo.tuning.frontier.chart import reward_chart
from lightning_dpo.tuning.frontier.page import render
from lightning_dpo.tuning.frontier.result import Failure
from lightning_dpo.tuning.frontier.table import print_result

FAILURE = Failure("KTO", "0.1, seed 0", "diverged: the loss is <nan>")


def test_the_chart_has_a_curve_for_each_method_below_the_limit() -> None:
    chart = reward_chart(made_up())
    names = [trace["name"] for trace in chart.data]
    assert names == ["best reachable", "DPO", "PPO <b>"]
    best, dpo, _ = chart.data
    assert dpo["x"] == sorted(KLS)
    assert len(dpo["error_y"]["array"]) == 3
    assert all(reward <= max(best["y"]) for reward in dpo["y"])
    assert "&lt;b&gt;" in str(chart.data[2]["text"][0])


def test_policies_far_out_do_not_squeeze_the_others() -> None:
    far = made_up(kls=(1.0,))
    chart = reward_chart(far)
    assert chart.layout["xaxis"]["range"] == [0, pytest.approx(1.6)]
    assert "9 of 15" in chart.note


def test_the_page() -> None:
    html = render(made_up(failures=(FAILURE,)))
    assert "<b>DPO</b> comes nearest to the best" in html
    assert "the loss is &lt;nan&gt;" in html
    figures = re.search(r'id="charts">(.*?)</script>', html, re.DOTALL)
    assert figures
    assert len(json.loads(figures[1])) == 1
    assert "http" not in re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("sampled", "told"),
    [
        ({}, "samples of the reference and of 1 trained policies; they"),
        (
            {"fitted": (2.0, 1.9)},
            "and of 1 trained policies and of a policy fitted to the best one at KL 8, which itself has "
            "1.9 at KL 2.0, 95% of the gain; they",
        ),
        (
            {"policies": 0, "fitted": (30.0, 1.9)},
            "samples of the reference and of a policy fitted to the best one at KL 8, which itself has "
            "1.9 at KL 30.0; they",
        ),
    ],
)
def test_the_page_says_what_the_limit_comes_from(sampled: dict[str, Any], told: str) -> None:
    assert told in render(made_up(limit=dataclasses.replace(limit(), **sampled)))


def test_a_page_without_a_limit() -> None:
    html = render(made_up(limit=limit(20)))
    assert "No method reaches a KL of the comparison" in html


def test_the_table_fits_eighty_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_result(made_up(failures=(FAILURE,)), console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    row = next(line for line in text.splitlines() if "DPO" in line)
    assert re.search(r"90 ± 2.*90 ± 2.*KL 9\.0", row)
    assert "went wrong: KTO" in text
