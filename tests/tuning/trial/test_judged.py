"""Completions of a trial before a judge: what is logged, and kept for each prompt."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trial_jobs import run_in, spec_of

from lightning_dpo.tuning.objective import Objective
from lightning_dpo.tuning.recipe.judge import judged_metrics
from lightning_dpo.tuning.trial.outcomes import PairOutcomes, load_outcomes

PROMPTS = 5


def judged(project: Path, location: Path, judge: Any, metric: str) -> tuple[dict[str, float], PairOutcomes]:
    """What a trial reports at last, and what it keeps."""
    spec = spec_of(
        project,
        location,
        objective=Objective.parse(metric),
        kl_prompts=PROMPTS,
        kl_tokens=8,
        judge=judge,
        judged=judged_metrics(judge),
    )
    reports: list[dict[str, Any]] = []
    outcome, _ = run_in(spec, reports=reports)
    assert str(outcome.status) == "finished", outcome.reason
    assert set(spec.judged) <= set(reports[-1])
    kept = load_outcomes(spec.outcomes, "t", step=reports[-1]["step"])
    assert kept is not None
    return reports[-1], kept


@pytest.mark.parametrize(
    ("judge", "metric"),
    [
        ("judges.vowels", "val/score"),
        ({"class_path": "judges.Letter", "init_args": {"letter": "e"}}, "val/score"),
        ("judges.vowels", "val/win_rate"),
        ("judges.longer", "val/win_rate"),
    ],
)
def test_what_the_judge_says_is_kept_for_each_prompt(
    judge: Any, metric: str, project: Path, tmp_path: Path
) -> None:
    report, kept = judged(project, tmp_path, judge, metric)
    assert len(kept.keys) == PROMPTS
    assert kept.mean == pytest.approx(report[metric], abs=1e-6)
    if metric == "val/score":
        assert len(set(kept.values.tolist())) > 1
        error = float(np.std(kept.values, ddof=1)) / math.sqrt(PROMPTS)
        assert report["val/score_error"] == pytest.approx(error, abs=1e-6)
    else:
        assert set(kept.values.tolist()) <= {0.0, 0.5, 1.0}


def test_trials_are_judged_on_the_same_prompts(project: Path, tmp_path: Path) -> None:
    first, second = (judged(project, tmp_path / name, "judges.vowels", "val/score")[1] for name in "ab")
    np.testing.assert_array_equal(first.keys, second.keys)
    np.testing.assert_array_equal(first.values, second.values)


def test_pairs_are_kept_where_trials_are_ranked_by_them(project: Path, tmp_path: Path) -> None:
    report, kept = judged(project, tmp_path, "judges.vowels", "val/rewards/accuracy")
    assert len(kept.keys) == 8 > PROMPTS
    assert kept.mean == pytest.approx(report["val/rewards/accuracy"])
