"""A sweep whose trials are ranked by what a judge says of their completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sweep_project import settings

from lightning_dpo.tuning import SweepConfig, SweepResult, sweep

pytestmark = pytest.mark.heavy

PROMPTS = 24


def judged(project: Path, **changes: Any) -> SweepConfig:
    given: dict[str, Any] = {
        "space": {"model.optimizer.lr": {"loguniform": [1e-3, 1e-1]}},
        "samples": 3,
        "objective": {"maximize": "val/score", "minimize": "val/kl"},
        "judge": "judges.vowels",
        "kl_prompts": PROMPTS,
        "kl_tokens": 24,
        "export": False,
        "name": "judged",
        **settings(project),
    }
    return SweepConfig(**{**given, **changes})


@pytest.fixture(scope="module")
def result(cluster: None, project: Path) -> SweepResult:
    return sweep(judged(project), verbose=False)


def test_trials_are_ranked_and_compared_prompt_by_prompt(result: SweepResult) -> None:
    scores = [trial.metrics["val/score"] for trial in result.trials]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1
    assert set(result.comparisons) == {trial.id for trial in result.trials}
    for trial in result.trials:
        one = result.comparisons[trial.id]
        assert one.pairs == PROMPTS
        assert one.mean == pytest.approx(trial.metrics["val/score"], abs=1e-6)
    assert {goal.metric for goal in result.frontier_goals} == {"val/score", "val/kl"}


def test_the_report_draws_the_score_against_the_kl(result: SweepResult) -> None:
    report = Path(result.report_path).read_text()
    assert f"on {PROMPTS} completions of the same prompts" in report
    assert "win rate" in report


def test_what_another_judge_says_is_not_compared(result: SweepResult, project: Path) -> None:
    others = {"judge": {"class_path": "judges.Letter", "init_args": {"letter": "e"}}}
    with pytest.raises(ValueError, match="`judge` changed since"):
        sweep(judged(project, samples=4, **others), resume=True, verbose=False)
    start = {"search": "optuna", "start_from": {"sweep": result.location}, "name": "other"}
    with pytest.raises(ValueError, match=r"completions are measured alike, got `judge` judges\.vowels"):
        sweep(judged(project, **start, **others), verbose=False)
    with pytest.raises(ValueError, match=f"got `kl_prompts` {PROMPTS} and not 7"):
        sweep(judged(project, **start, kl_prompts=7), verbose=False)
