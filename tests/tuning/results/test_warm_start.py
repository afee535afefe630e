"""What a sweep learns of earlier ones, and where it refuses to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweep_results import ACCURACY, KL, made_up

from lightning_dpo.tuning import SweepConfig, SweepResult
from lightning_dpo.tuning.recipe.recipe import Recipe
from lightning_dpo.tuning.results.extension import finished_before
from lightning_dpo.tuning.results.folder import load_result, save_result
from lightning_dpo.tuning.results.warm_start import as_told, load_start
from lightning_dpo.tuning.trial.spec import TrialSpec

BETA, LR = "model.loss.beta", "model.optimizer.lr"
SPACE = {BETA: {"loguniform": [0.01, 0.5]}, LR: {"loguniform": [1e-6, 1e-4]}}
GOALS = {"maximize": ACCURACY, "minimize": KL}
RECIPE = Recipe(overrides={"model.policy": "a/b", "data.train": "x.jsonl"})


@pytest.fixture
def earlier(tmp_path: Path) -> SweepResult:
    made = made_up(str(tmp_path / "earlier"), trials=20, wide=False)
    text = RECIPE.parse(made.best.overrides).to_yaml()
    result = replace(made, data_fingerprint="f" * 32, recipe=text)
    for trial in result.trials:
        trial.save(spec(tmp_path / "earlier").records)
    save_result(result)
    return load_result(result.location)


def spec(folder: Path, config: SweepConfig | None = None, recipe: Recipe = RECIPE) -> TrialSpec:
    config = config or configured()
    return TrialSpec(recipe, config.search_space(), config.goals(), str(folder), "")


def configured(**changes: Any) -> SweepConfig:
    return SweepConfig(**{"space": SPACE, "objective": GOALS, "search": "optuna", "samples": 5, **changes})


def started(config: SweepConfig, folder: Path, *, data: str = "f" * 32, recipe: Recipe = RECIPE) -> Any:
    return load_start(config, spec(folder, config, recipe), fingerprint=data)


def test_finished_trials_are_told_with_their_values(earlier: SweepResult, tmp_path: Path) -> None:
    start, lines = started(configured(start_from={"sweep": earlier.location}), tmp_path)
    finished = {trial.id: trial for trial in earlier.trials if trial.status == "finished"}
    assert 0 < len(finished) < 20
    assert {point.trial for point in start.told} == set(finished)
    assert start.run == ()
    for point in start.told:
        trial = finished[point.trial]
        assert point.overrides == trial.overrides
        assert point.result == (trial.metrics[ACCURACY], trial.metrics[KL])
    assert lines == [
        f"start_from: {len(finished)} results of {earlier.location} are told to the searcher, and not run "
        "again"
    ]


def test_points_and_sweeps_are_mixed(earlier: SweepResult, tmp_path: Path) -> None:
    point = {BETA: 0.1, LR: 1e-5}
    known = {BETA: 0.2, LR: 1e-5, "result": {ACCURACY: 0.7, KL: 2.0}}
    config = configured(start_from=[point, known, earlier.location, {"sweep": earlier.location, "run": 2}])
    start, lines = started(config, tmp_path)
    finished = [trial for trial in earlier.trials if trial.status == "finished"]
    assert [one.overrides for one in start.run] == [point, *(trial.overrides for trial in finished[:2])]
    assert len(start.told) == 1 + len(finished)
    assert start.told[0].result == (0.7, 2.0)
    assert lines[-2:] == [
        "start_from: results of 1 point are told to optuna, and not run",
        "start_from: 3 points are run first",
    ]


def test_a_search_that_learns_nothing_runs_points_and_refuses_results_of_a_sweep(
    earlier: SweepResult, tmp_path: Path
) -> None:
    known = {BETA: 0.2, LR: 1e-5, "result": {ACCURACY: 0.7, KL: 2.0}}
    start, lines = started(configured(search="random", start_from=known), tmp_path)
    assert [one.overrides for one in start.run] == [{BETA: 0.2, LR: 1e-5}]
    assert start.told == ()
    assert lines == ["start_from: 1 point is run first, those with results too: random learns from none"]
    with pytest.raises(ValueError, match=r"`search` random learns from none: use optuna.*run: 3"):
        started(configured(search="random", start_from=earlier.location), tmp_path)
    best = {"sweep": earlier.location, "run": 2}
    # Its best trials can be run whatever the data were.
    start, _ = started(configured(search="random", start_from=best), tmp_path, data="0" * 32)
    assert len(start.run) == 2


def test_other_data_or_another_objective_are_refused(earlier: SweepResult, tmp_path: Path) -> None:
    config = configured(start_from=earlier.location)
    with pytest.raises(
        ValueError, match=r"`start_from` must be a sweep on the same data.*ffffffff and not 0000"
    ):
        started(config, tmp_path, data="0" * 32)
    with pytest.raises(
        ValueError, match=r"the same objective, got val/rewards/accuracy \(max\), val/kl \(min\)"
    ):
        started(configured(start_from=earlier.location, objective=ACCURACY), tmp_path)
    save_result(replace(earlier, data_fingerprint=""))
    with pytest.raises(ValueError, match="does not say which it had: an earlier version wrote it"):
        started(config, tmp_path)
    with pytest.raises(ValueError, match=r"`start_from` cannot be read: .*with sweep\.json in it"):
        started(configured(start_from=str(tmp_path / "nowhere")), tmp_path)


def test_another_recipe_is_said_aloud(earlier: SweepResult, tmp_path: Path) -> None:
    other = replace(RECIPE, overrides={**RECIPE.overrides, "trainer.max_epochs": 7, "data.num_processes": 3})
    _, lines = started(configured(start_from=earlier.location), tmp_path, recipe=other)
    assert "LOOK" in lines[1]
    assert lines[1].endswith("They differ in trainer.max_epochs")


def test_trials_outside_of_the_space_are_left_out(earlier: SweepResult, tmp_path: Path) -> None:
    finished = [trial for trial in earlier.trials if trial.status == "finished"]
    middle = sorted(trial.overrides[BETA] for trial in finished)[len(finished) // 2]
    narrow = {**SPACE, BETA: {"loguniform": [middle, 0.5]}}
    start, lines = started(configured(space=narrow, start_from=earlier.location), tmp_path)
    within = [trial for trial in finished if trial.overrides[BETA] >= middle]
    assert {point.trial for point in start.told} == {trial.id for trial in within}
    assert lines[0].endswith(f"; {len(finished) - len(within)} more lie outside of `space`")
    nowhere = {**SPACE, BETA: {"uniform": [5.0, 6.0]}}
    with pytest.raises(ValueError, match="none of them within"):
        started(configured(space=nowhere, start_from=earlier.location), tmp_path)


def test_more_points_than_samples(tmp_path: Path) -> None:
    points = [{BETA: 0.1, LR: 1e-5}, {BETA: 0.2, LR: 1e-5}]
    with pytest.raises(
        ValueError, match="`samples` must be at least the 2 points that `start_from` runs first, got 1"
    ):
        started(configured(samples=1, start_from=points), tmp_path)


def test_another_searcher_is_told_of_a_sweeps_own_trials(earlier: SweepResult, tmp_path: Path) -> None:
    told = as_told(earlier.trials, spec(tmp_path)).told
    assert {point.trial for point in told} == {t.id for t in earlier.trials if t.status == "finished"}


def test_a_finished_sweep_takes_more_trials_of_the_same_kind(earlier: SweepResult) -> None:
    folder = Path(earlier.location)
    asked = {"space": SPACE, "objective": GOALS, "samples": 20, "search": "optuna"}
    save_result(replace(earlier, settings={**asked, "start_from": None}))

    def before(data: str = "f" * 32, recipe: Recipe = RECIPE, **changes: Any) -> Any:
        config = configured(**{**asked, **changes})
        return finished_before(spec(folder, config, recipe), config, fingerprint=data)

    found = before(samples=32)
    assert (found.samples, found.search, found.seconds) == (20, "optuna", earlier.seconds)
    applied = found.applied_to(configured(samples=7))
    assert (applied.samples, applied.start_from) == (20, None)
    longer = replace(RECIPE, overrides={**RECIPE.overrides, "trainer.max_epochs": 7})
    # As many as before: nothing is added, so nothing needs to be comparable.
    assert before(data="0" * 32, recipe=longer).samples == 20
    with pytest.raises(ValueError, match="the training or validation data changed since"):
        before(samples=32, data="0" * 32)
    with pytest.raises(ValueError, match=r"trainer\.max_epochs changed since"):
        before(samples=32, recipe=longer)
    with pytest.raises(ValueError, match="`space` changed since"):
        before(samples=32, space={**SPACE, BETA: {"uniform": [0.1, 0.2]}})
    with pytest.raises(ValueError, match="`objective` changed since"):
        before(samples=32, objective=ACCURACY)
    with pytest.raises(ValueError, match="`start_from` changed since"):
        before(samples=32, start_from={BETA: 0.1, LR: 1e-5})


def test_a_sweep_that_has_not_ended_has_no_settings(tmp_path: Path) -> None:
    assert finished_before(spec(tmp_path), configured(), fingerprint="") is None
