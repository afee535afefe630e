from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lightning_dpo.tuning import Objective, SearchSpace, SweepConfig, SweepResult
from lightning_dpo.tuning.recipe.recipe import Recipe
from lightning_dpo.tuning.report.page import write_report
from lightning_dpo.tuning.report.summary import print_summary
from lightning_dpo.tuning.results.folder import load_result, save_result
from lightning_dpo.tuning.results.gather import completed_trials, gather, is_interrupted
from lightning_dpo.tuning.rounds.run import run_rounds
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.best_step import KeptStep
from lightning_dpo.tuning.trial.checkpoints import CHECKPOINT, PROGRESS
from lightning_dpo.tuning.trial.outcomes import PairOutcomes, kept_outcomes
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


def peaked(folder: Path, trial: str, *, at: int, right: list[int], kl: float) -> TrialRecord:
    """A trial that kept a step, at which it had these right of the ten pairs that rank it."""
    record = reported(trial, 2, 4, 6)
    values = np.isin(np.arange(10), right).astype(float)
    outcomes = PairOutcomes(np.arange(1, 21, 2, dtype=np.uint64), values, np.ones(10), at)
    outcomes.save(Storage(folder / "outcomes"), f"{kept_outcomes(trial, at)}/rank0")
    report = {**record.history[at // 2 - 1], "val/kl": kl}
    name = f"1_{at:06d}.weights"
    kept = KeptStep(at, "m", 0.9, float(values.mean()), 12, 10, name, report)
    for other in (name, "1_000006.weights", "1_000004.state"):
        place = folder / "checkpoints" / trial / other
        place.mkdir(parents=True, exist_ok=True)
        (place / CHECKPOINT).touch()
        (place / PROGRESS).write_text("{}")
    return replace(record, kept=kept, checkpoint=str(folder / "checkpoints" / trial / name))


def test_kept_steps_rank_trials_and_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = {"metrics": {"done": True}}
    result = gathered(
        tmp_path,
        (peaked(tmp_path, "a", at=2, right=[0, 1, 2, 3, 4, 5], kl=0.5), ended),
        (peaked(tmp_path, "b", at=4, right=[0, 1, 2, 3, 4, 5, 6], kl=3.0), ended),
        (replace(peaked(tmp_path, "c", at=6, right=[9], kl=9.0), again=4, starts=2), {"metrics": {}}),
    )
    # By the other half of the pairs, not by what the steps were chosen for, nor by the last reports.
    assert [trial.id for trial in result.trials] == ["b", "a", "c"]
    assert [trial.metrics["m"] for trial in result.trials] == [0.7, 0.6, 0.1]
    assert [trial.model_step for trial in result.trials] == [4, 2, 6]
    assert {trial.step for trial in result.trials} == {6}
    compared = result.comparisons
    assert (compared["b"].mean, compared["a"].difference, compared["a"].pairs) == (
        0.7,
        pytest.approx(-0.1),
        10,
    )
    assert result.recommended.id == "a"
    assert "trial a, as of step 2, has the lowest KL, 0.5 and not 3" in result.recommendation.reason
    assert result.recipe.startswith(f"# The best trial (b) of {tmp_path}: m 0.7000 at step 4.\n")
    flat = " ".join(line.removeprefix("# ") for line in result.recipe.splitlines())
    assert "The model is that of step 4 of 6, the best of its validations by 12 of the pairs" in flat
    assert "m above is of the other 10, which took no part in that choice" in flat
    assert f"The recommended trial (a) of {tmp_path}: m 0.6000 at step 2." in result.recommended_recipe

    save_result(result)
    assert load_result(str(tmp_path)).trials == result.trials
    table = pq.read_table(tmp_path / "results.parquet").to_pandas()
    assert table[table.kept].set_index("trial").step.to_dict() == {"b": 4, "a": 2, "c": 6}
    of_b = table[table.trial == "b"]
    assert (of_b.kept_step == 4).all()
    assert (of_b["kept/m"] == 0.7).all()
    assert of_b.m.tolist() == [0.2, 0.4, 0.6]
    write_report(result)
    page = (tmp_path / "report.html").read_text()
    assert "12 of the validation pairs chose it, and the other 10 rank the trials" in page
    assert "kept step" in page
    assert "2 starts, 4 steps again" in page
    print_summary(result)
    shown = capsys.readouterr().out
    assert "The model is that of step 4 of 6" in shown
    assert "ran again what was reported since: trial c 4 steps." in shown

    # Of trials that are over only what is kept stays; Tune did not say of the third one that it is.
    left = {trial: sorted(p.name for p in (tmp_path / "checkpoints" / trial).iterdir()) for trial in "abc"}
    assert left["a"] == ["1_000002.weights"]
    assert left["b"] == ["1_000004.weights"]
    assert left["c"] == ["1_000004.state", "1_000006.weights"]


def test_an_interrupted_search_runs_nothing_again(tmp_path: Path) -> None:
    spec = TrialSpec(RECIPE, SPACE, Objective.parse("m"), str(tmp_path), "")
    over = reported("a", 2, 4, 6).ended(TrialStatus.FINISHED)
    records = [over, reported("b", 2)]
    for record in records:
        record.save(spec.records)

    class Outcome(list):
        _experiment_analysis = SimpleNamespace(
            trials=[SimpleNamespace(trial_id=record.id, config={}) for record in records]
        )
        _lightning_dpo_interrupted = True

    told = [SimpleNamespace(checkpoint=None, metrics=None, error=None) for _ in records]
    outcome: Any = Outcome(told)
    trials = completed_trials(spec, outcome)
    assert [(trial.status, trial.reason) for trial in trials] == [
        ("finished", ""),
        ("stopped", "interrupted"),
    ]
    assert is_interrupted(trials)
    config = SweepConfig(space={"model.loss.beta": 0.1}, repeats=3, confirm=2)
    assert run_rounds(spec, trials, config, concurrency=1, verbose=False) == ()


@pytest.mark.parametrize("begun", [[], [reported("a")]])
def test_a_budget_that_was_too_short_is_not_told_as_failures(
    begun: list[TrialRecord], tmp_path: Path
) -> None:
    spec = TrialSpec(RECIPE, SPACE, Objective.parse("m"), str(tmp_path), "")
    given = {"settings": {"time_budget": 3.0}, "machines": [], "reference_passes": 0, "seconds": 1.0}
    with pytest.raises(ValueError, match=r"no trial had a result when `time_budget` was over, got 3 seconds"):
        gather(spec, begun, **given)


def test_an_interruption_before_the_first_report_says_how_to_go_on(tmp_path: Path) -> None:
    spec = TrialSpec(RECIPE, SPACE, Objective.parse("m"), str(tmp_path), "")
    cut = replace(reported("a"), status=TrialStatus.STOPPED, reason="interrupted")
    with pytest.raises(ValueError, match=r"interrupted before a trial had a result.*--resume"):
        gather(spec, [cut], settings={}, machines=[], reference_passes=0, seconds=1.0)
