from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_dpo.tuning import Objective, SearchSpace, SweepResult
from lightning_dpo.tuning.recipe.recipe import Recipe
from lightning_dpo.tuning.results.gather import completed_trials, gather
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.trial.status import TrialStatus

SPACE = SearchSpace.parse({"model.loss.beta": {"uniform": [0.1, 1.0]}})
RECIPE = Recipe(overrides={"model.policy": "a/b", "data.train": "x.jsonl"})


def reported(trial: str, *steps: int) -> TrialRecord:
    record = TrialRecord(trial, {"model.loss.beta": 0.5}).restarted()
    for step in steps:
        totals = {"total_steps": 6, "startup_seconds": 0.1, "reference_passes": 0}
        record = record.reported({"m": step / 10, "step": step, **totals})
    return record


def gathered(folder: Path, *trials: tuple[TrialRecord | None, dict[str, Any]], note: str = "") -> SweepResult:
    spec = TrialSpec(RECIPE, SPACE, Objective.parse("m"), str(folder), "")
    known: list[Any] = []
    results: list[Any] = []
    for number, (record, changes) in enumerate(trials):
        if record is not None:
            record.save(spec.records)
        known.append(SimpleNamespace(trial_id=record.id if record else f"t{number}", config={}))
        results.append(SimpleNamespace(**{"checkpoint": None, "metrics": None, "error": None, **changes}))

    class Outcome(list):
        _experiment_analysis = SimpleNamespace(trials=known)

    machines = [{"CPU": 2.0, "memory": 1.0}]
    outcome: Any = Outcome(results)
    trials = completed_trials(spec, outcome)
    return gather(spec, trials, settings={}, machines=machines, reference_passes=1, seconds=1.0, note=note)


def test_what_only_ray_knows_completes_the_records(tmp_path: Path) -> None:
    gone = {"error": RuntimeError("line\nActorDiedError: the machine is gone")}
    result = gathered(
        tmp_path,
        (reported("a", 2, 4), {"metrics": {"checkpoint_path": "/at/a"}}),
        (reported("b", 2, 4, 6), {"checkpoint": SimpleNamespace(path="/at/b")}),
        (reported("c", 2), gone),
        (None, gone),
    )
    by_id = {trial.id: trial for trial in result.trials}
    statuses = {name: trial.status for name, trial in by_id.items()}
    assert statuses == {"a": "stopped", "b": "finished", "c": "failed", "t3": "failed"}
    assert (by_id["a"].checkpoint, by_id["b"].checkpoint) == ("/at/a", "/at/b")
    assert by_id["c"].reason == "ActorDiedError: the machine is gone"
    assert result.best.id == "b"
    assert result.reference_passes == 1
    assert result.environment["machines"] == [{"CPU": 2.0, "GPU": 0}]


def test_the_best_recipe_says_whose_it_is(tmp_path: Path) -> None:
    recipe = gathered(tmp_path, (reported("a", 6), {}), note="Of two parents.").recipe
    assert recipe.startswith(f"# The best trial (a) of {tmp_path}: m 0.6000 at step 6.\n")
    assert "\n# Of two parents.\n" in recipe
    assert "beta: 0.5" in recipe


def test_a_trial_that_ended_stays_as_it_recorded_itself(tmp_path: Path) -> None:
    wrong = reported("a", 2).ended(TrialStatus.DIVERGED, reason="nan")
    result = gathered(tmp_path, (wrong, {}), (reported("b", 6), {}))
    assert [trial.status for trial in result.trials] == ["finished", "diverged"]


def test_where_every_trial_went_wrong_what_is_known_is_kept(tmp_path: Path) -> None:
    wrong = reported("a", 2).ended(TrialStatus.DIVERGED, reason="nan at step 3")
    with pytest.raises(ValueError, match="every trial went wrong; the first one: diverged: nan at step 3"):
        gathered(tmp_path, (wrong, {}))
    assert json.loads((tmp_path / "sweep.json").read_text())["statuses"]["a"][0] == "diverged"
