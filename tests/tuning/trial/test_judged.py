"""Completions of a trial before a judge: what is logged, and kept for each prompt."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from pair_rows import jsonl
from trial_jobs import run_in, spec_of

from lightning_dpo.evaluation.judges import ClassifierJudge
from lightning_dpo.tuning.objective import Objective
from lightning_dpo.tuning.recipe.judge import judged_metrics
from lightning_dpo.tuning.trial.kl import KLMonitor, load_judge_model
from lightning_dpo.tuning.trial.outcomes import PairOutcomes, load_outcomes

PROMPTS = 5


def judged(
    project: Path, location: Path, judge: Any, metric: str, **overrides: Any
) -> tuple[dict[str, float], PairOutcomes]:
    """What a trial reports at last, and what it keeps."""
    spec = spec_of(
        project,
        location,
        overrides=overrides,
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
        assert len(set(kept.values.tolist())) > 1 or judge != "judges.vowels"
        error = float(np.std(kept.values, ddof=1)) / math.sqrt(PROMPTS)
        assert report["val/score_error"] == pytest.approx(error, abs=1e-6)
    else:
        assert set(kept.values.tolist()) <= {0.0, 0.5, 1.0}


def test_trials_are_judged_on_the_same_prompts(project: Path, tmp_path: Path) -> None:
    first, second = (judged(project, tmp_path / name, "judges.vowels", "val/score")[1] for name in "ab")
    np.testing.assert_array_equal(first.keys, second.keys)
    np.testing.assert_array_equal(first.values, second.values)


def test_prompts_are_the_same_distinct_ones_whatever_the_batches(project: Path, tmp_path: Path) -> None:
    data = {"data.train": doubled(project, tmp_path), "data.validation_split": 0.5}
    first, second = (
        judged(project, tmp_path / str(number), "judges.vowels", "val/score", **data, **batches)[1]
        for number, batches in enumerate(({"data.batch_size": 2}, {"data.tokens_per_batch": 64}))
    )
    np.testing.assert_array_equal(first.keys, second.keys)
    assert len(set(first.keys.tolist())) == PROMPTS


def test_few_prompts_are_completed_more_than_once(project: Path, tmp_path: Path) -> None:
    row = json.loads((project / "pairs.jsonl").read_text().splitlines()[0])
    same = {"data.train": jsonl(tmp_path / "same.jsonl", [row] * 16)}
    report, kept = judged(project, tmp_path, "judges.vowels", "val/score", **same)
    assert len(set(kept.keys.tolist())) == PROMPTS
    assert len(set(kept.values.tolist())) > 1
    assert kept.mean == pytest.approx(report["val/score"], abs=1e-6)


def doubled(project: Path, folder: Path) -> str:
    """The pairs, each of them twice, with prompts of different lengths."""
    rows = [json.loads(line) for line in (project / "pairs.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["prompt"] = "so " * (number % 7) + row["prompt"]
    return jsonl(folder / "doubled.jsonl", [*rows, *rows])


def test_a_judge_that_is_a_model_is_loaded_before_trials_run(project: Path, tmp_path: Path) -> None:
    spec = spec_of(project, tmp_path, judge=str(project / "no_such/judge"), kl_prompts=1)
    with pytest.raises(ValueError, match="no_such/judge"):
        load_judge_model(spec)
    loaded: list[str] = []

    class Noted(ClassifierJudge):
        def load(self) -> None:
            loaded.append(self.model)

    KLMonitor(1, judge=Noted("a/b")).setup(None, pl.LightningModule(), "fit")  # type: ignore[arg-type]
    assert loaded == ["a/b"]


def test_pairs_are_kept_where_trials_are_ranked_by_them(project: Path, tmp_path: Path) -> None:
    report, kept = judged(project, tmp_path, "judges.vowels", "val/rewards/accuracy")
    assert len(kept.keys) == 8 > PROMPTS
    assert kept.mean == pytest.approx(report["val/rewards/accuracy"])
