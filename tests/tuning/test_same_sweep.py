"""A sweep goes on as the sweep that it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweep_project import settings
from trial_jobs import spec_of

from lightning_dpo.tuning import SweepConfig
from lightning_dpo.tuning.rounds.begun import check_same_sweep, note_beginning
from lightning_dpo.tuning.trial.spec import TrialSpec

SPACE = {"model.loss.beta": {"uniform": [0.1, 0.2]}}


def begun(project: Path, location: Path, **changes: Any) -> tuple[TrialSpec, SweepConfig]:
    given = settings(project, overrides=changes.pop("overrides", {}))
    config = SweepConfig(**{"space": SPACE, **given, **changes})
    spec = replace(spec_of(project, location), recipe=config.to_recipe(), space=config.search_space())
    return spec, config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"space": {"model.loss.beta": {"uniform": [0.1, 0.3]}}}, "`space`"),
        ({"judge": "judges.vowels", "kl_prompts": 2}, "`kl_prompts`, `judge`"),
        ({"kl_tokens": 9}, "`kl_tokens`"),
        ({"objective": "val/logratio/margin"}, "`objective`"),
        ({"keep": "best"}, "`keep`"),
        ({"workers": 2}, "`workers`"),
        ({"overrides": {"trainer.max_epochs": 3}}, "trainer.max_epochs"),
    ],
)
def test_another_sweep_is_refused(changes: dict[str, Any], named: str, project: Path, tmp_path: Path) -> None:
    note_beginning(*begun(project, tmp_path), fingerprint="f")
    with pytest.raises(ValueError, match=f"must be resumed as the sweep that it is, and .*{named}"):
        check_same_sweep(*begun(project, tmp_path, **changes), fingerprint="f")


def test_other_data_are_refused(project: Path, tmp_path: Path) -> None:
    note_beginning(*begun(project, tmp_path), fingerprint="f")
    with pytest.raises(ValueError, match="the training or validation data changed since it began"):
        check_same_sweep(*begun(project, tmp_path), fingerprint="g")


def test_settings_that_do_not_matter_may_change_and_those_not_used_are_named(
    project: Path, tmp_path: Path
) -> None:
    note_beginning(*begun(project, tmp_path), fingerprint="f")
    # What was written first stays.
    note_beginning(*begun(project, tmp_path, concurrency=7), fingerprint="g")
    assert check_same_sweep(*begun(project, tmp_path), fingerprint="f") == []
    free = {"samples": 99, "confirm": 1, "storage": "elsewhere", "export": False}
    assert check_same_sweep(*begun(project, tmp_path, **free), fingerprint="f") == []
    other = begun(project, tmp_path, concurrency=1, stop={"steps": 4}, time_budget=9.0)
    assert check_same_sweep(*other, fingerprint="f") == ["concurrency", "stop", "time_budget"]
    assert check_same_sweep(*other, fingerprint="f", is_new_round=True) == []
    more = begun(project, tmp_path, workers=2)
    assert check_same_sweep(*more, fingerprint="f", is_new_round=True) == []


def test_a_sweep_that_an_older_version_began_goes_on(project: Path, tmp_path: Path) -> None:
    assert check_same_sweep(*begun(project, tmp_path), fingerprint="f") == []
