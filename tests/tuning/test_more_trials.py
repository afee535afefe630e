"""Sweeps that start from known points, go on after their end, and learn from earlier ones, run for real."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from sweep_project import settings

from lightning_dpo.tuning import SweepConfig, SweepResult, sweep
from lightning_dpo.tuning.results.folder import load_result

pytestmark = pytest.mark.heavy

LR = "model.optimizer.lr"
SPACE = {LR: {"loguniform": [1e-4, 1e-2]}}


def config(project: Path, name: str, **changes: Any) -> SweepConfig:
    given = {"space": SPACE, "concurrency": 1, "export": False, "name": name, "samples": 2, **changes}
    return SweepConfig(**given, **settings(project, overrides={"trainer.val_check_interval": 6}))


def starts(result: SweepResult) -> dict[str, int]:
    """How often each trial was started, from what each wrote about itself."""
    records = (json.loads(path.read_text()) for path in Path(result.location, "trials").glob("*.json"))
    return {record["id"]: record["starts"] for record in records}


def test_a_random_sweep_goes_on_to_the_trials_of_one_run_at_once(cluster: None, project: Path) -> None:
    first = sweep(config(project, "grows", start_from={LR: 3e-3}, repeats=2), verbose=False)
    assert LR in first.trials[0].overrides
    assert 3e-3 in [trial.overrides[LR] for trial in first.trials]
    assert len(first.reruns) == 2
    grown = sweep(config(project, "grows", samples=3, repeats=2), resume=True, verbose=False)
    ids = {trial.id for trial in first.trials}
    assert ids < {trial.id for trial in grown.trials}
    assert len(grown.trials) == 3
    # Each ran once, those with other seeds too, and the new one was repeated as the others were.
    assert set(starts(grown).values()) == {1}
    assert len(starts(grown)) == 3 + 3
    assert sorted(run.rerun_of for run in grown.reruns) == sorted(trial.id for trial in grown.trials)
    at_once = sweep(config(project, "at_once", samples=3, start_from={LR: 3e-3}), verbose=False)
    assert sorted(trial.overrides[LR] for trial in at_once.trials) == sorted(
        trial.overrides[LR] for trial in grown.trials
    )
    assert load_result(grown.location).settings["samples"] == 3
    report = Path(grown.report_path).read_text()
    assert all(trial.id in report for trial in grown.trials)
    # Asked for no more than it has, it runs nothing.
    again = sweep(config(project, "grows", samples=3, repeats=2), resume=True, verbose=False)
    assert {trial.id for trial in again.trials} == {trial.id for trial in grown.trials}
    assert set(starts(again).values()) == {1}


def test_a_sweep_goes_on_in_the_folder_that_it_was_moved_to(
    cluster: None, project: Path, tmp_path: Path
) -> None:
    first = sweep(config(project, "moved"), verbose=False)
    storage = tmp_path / "elsewhere"
    storage.mkdir()
    Path(first.location).rename(storage / "moved")
    again = replace(config(project, "moved", samples=3, export=True), storage=str(storage))
    grown = sweep(again, resume=True, verbose=False)
    assert {trial.id for trial in first.trials} < {trial.id for trial in grown.trials}
    assert set(starts(grown).values()) == {1}
    assert grown.location == str(storage / "moved")
    kept = {path.parent.name for path in (storage / "moved/checkpoints").glob("*/*")}
    assert kept == {trial.id for trial in grown.trials}
    assert (storage / "moved/best/model/config.json").is_file()


def test_a_study_holds_what_ran_and_a_later_sweep_learns_from_it(
    cluster: None, project: Path, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    search = {"class_path": "optuna", "init_args": {"storage": url}}
    known = [{LR: 2e-3}, {LR: 5e-4, "result": 0.5}]
    first = sweep(config(project, "studied", search=search, start_from=known), verbose=False)

    def study() -> list[optuna.trial.FrozenTrial]:
        return optuna.load_study(study_name="studied", storage=url).trials

    def ran() -> dict[str, tuple[float, float | None]]:
        found = [trial for trial in study() if "trial" in trial.user_attrs]
        assert all(trial.state == optuna.trial.TrialState.COMPLETE for trial in found)
        return {trial.user_attrs["trial"]: (trial.params[LR], trial.value) for trial in found}

    def expected(result: SweepResult) -> dict[str, tuple[float, float]]:
        return {t.id: (t.overrides[LR], t.metrics["val/rewards/accuracy"]) for t in result.trials}

    assert ran() == expected(first)
    assert len(study()) == 3
    assert (study()[0].params[LR], study()[0].value) == (5e-4, 0.5)
    assert 2e-3 in [trial.overrides[LR] for trial in first.trials]
    grown = sweep(config(project, "studied", search=search, samples=4), resume=True, verbose=False)
    assert len(grown.trials) == 4
    assert ran() == expected(grown)
    assert len(study()) == 5
    assert set(starts(grown).values()) == {1}

    other = {"class_path": "optuna", "init_args": {"storage": url, "study_name": "later"}}
    later = sweep(
        config(project, "later", search=other, samples=1, start_from={"sweep": grown.location}), verbose=False
    )
    told = optuna.load_study(study_name="later", storage=url).trials
    assert len(told) == 5
    assert {t.user_attrs["trial"]: (t.params[LR], t.value) for t in told[:4]} == expected(grown)
    assert told[4].user_attrs["trial"] == later.best.id
    # A row more, and the results are of other data.
    pairs = project / "pairs.jsonl"
    other_pairs = tmp_path / "other.jsonl"
    other_pairs.write_text(pairs.read_text() + pairs.read_text().splitlines()[0] + "\n")
    wrong = config(project, "wrong", search="optuna", start_from=grown.location)
    wrong.overrides["data.train"] = str(other_pairs)
    with pytest.raises(ValueError, match="must be a sweep on the same data"):
        sweep(wrong, verbose=False)
    assert not (project / "sweeps" / "wrong").exists()


def test_optunas_pruner_stops_a_trial(cluster: None, project: Path) -> None:
    pruner = {"class_path": "MedianPruner", "init_args": {"n_startup_trials": 1}}
    # The second point does not learn: its margin stays at 0, below the first one's.
    points = [{LR: 5e-3}, {LR: 0.0}]
    given = config(
        project,
        "pruned",
        space={LR: {"uniform": [0.0, 1e-2]}},
        objective="val/logratio/margin",
        search={"class_path": "optuna", "init_args": {"pruner": pruner}},
        start_from=points,
    )
    given.overrides["trainer.val_check_interval"] = 2
    result = sweep(given, verbose=False)
    by_lr = {trial.overrides[LR]: trial for trial in result.trials}
    assert (by_lr[5e-3].status, by_lr[5e-3].step) == ("finished", 6)
    assert (by_lr[0.0].status, by_lr[0.0].step) == ("stopped", 2)
