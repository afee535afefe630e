from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sweep_project import settings

from lightning_dpo.tuning import Objective, SearchSpace, SweepConfig, sweep
from lightning_dpo.tuning.search.schedulers import make_scheduler

SPACE = SearchSpace.parse({"model.loss.beta": {"loguniform": [0.01, 1.0]}})
ONE, TWO = Objective.parse("m"), Objective.parse({"maximize": "a", "minimize": "b"})
PBT, PB2 = "ray.tune.schedulers.PopulationBasedTraining", "ray.tune.schedulers.pb2.PB2"


@pytest.mark.parametrize("objective", [ONE, TWO])
@pytest.mark.parametrize("name", ["none", "asha", "hyperband", "median", "pbt"])
def test_schedulers_by_name(name: str, objective: Objective) -> None:
    assert make_scheduler(name, space=SPACE, objective=objective) is not None


def test_schedulers_by_class_path() -> None:
    path = "ray.tune.schedulers.AsyncHyperBandScheduler"
    own = make_scheduler({"class_path": path, "init_args": {"max_t": 7}}, space=SPACE, objective=ONE)
    assert own._max_t == 7
    with pytest.raises(ValueError, match=r"`scheduler` must be one of none, asha.* importable .* got 'ahsa'"):
        make_scheduler("ahsa", space=SPACE, objective=ONE)
    with pytest.raises(ValueError, match="importable"):
        make_scheduler("ray.tune.schedulers.Ahsa", space=SPACE, objective=ONE)
    with pytest.raises(ValueError, match="does not take"):
        make_scheduler({"class_path": "asha", "init_args": {"nonsense": 1}}, space=SPACE, objective=ONE)
    with pytest.raises(ValueError, match=r"does not take .* grace_period must be <= max_t"):
        make_scheduler(
            {"class_path": "asha", "init_args": {"grace_period": 9, "max_t": 3}}, space=SPACE, objective=ONE
        )


@pytest.mark.parametrize("path", ["pbt", PBT, PB2, "sweep_faults.OwnPopulation"])
def test_checkpoints_are_copied_between_trials_of_one_process_only(path: str) -> None:
    space = {"model.loss.beta": {"uniform": [0.1, 1.0]}}
    for scheduler in (path, {"class_path": path, "init_args": {"perturbation_interval": 4}}):
        SweepConfig(space=space, scheduler=scheduler)
        with pytest.raises(ValueError, match=r"one process; got workers=2. Use asha"):
            SweepConfig(space=space, scheduler=scheduler, workers=2)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "scheduler",
    [
        {"class_path": "hyperband", "init_args": {"max_t": 3}},
        "median",
        {"class_path": "ray.tune.schedulers.AsyncHyperBandScheduler", "init_args": {"max_t": 2}},
    ],
    ids=["hyperband", "median", "class_path"],
)
def test_schedulers_run(cluster: None, project: Path, scheduler: Any, tmp_path: Path) -> None:
    config = SweepConfig(
        space={"model.optimizer.lr": {"choice": [1e-4, 3e-3]}},
        samples=4,
        scheduler=scheduler,
        export=False,
        **{**settings(project), "storage": str(tmp_path)},
    )
    result = sweep(config, verbose=False)
    assert len(result.trials) == 4
    assert {trial.status for trial in result.trials} <= {"finished", "stopped"}
    for trial in result.trials:
        steps = [entry["step"] for entry in trial.history]
        assert steps == [2, 4, 6][: len(steps)]
    if isinstance(scheduler, dict) and "max_t" in scheduler["init_args"]:
        longest = 2 * scheduler["init_args"]["max_t"]
        assert max(trial.step for trial in result.trials) == longest


@pytest.mark.heavy
def test_a_trial_that_is_paused_at_its_end_ends(cluster: None, project: Path, tmp_path: Path) -> None:
    config = SweepConfig(
        space={"model.optimizer.lr": {"grid": [1e-4, 3e-3]}},
        samples=1,
        search="grid",
        scheduler="sweep_faults.PausesAlways",
        time_budget=240,  # it would go on for ever where the trials do not end
        export=False,
        **{**settings(project), "storage": str(tmp_path)},
    )
    result = sweep(config, verbose=False)
    assert [trial.status for trial in result.trials] == ["finished"] * 2
    for trial in result.trials:
        assert [entry["step"] for entry in trial.history] == [2, 4, 6]
        assert trial.starts == 4  # one for each report, and one in which nothing was left


@pytest.mark.heavy
def test_pbt_hands_weights_and_rates_on(cluster: None, project: Path, tmp_path: Path) -> None:
    path = "model.optimizer.lr"
    given: dict[str, Any] = {
        "perturbation_interval": 2,
        "quantile_fraction": 0.5,
        "hyperparam_mutations": {path: [1e-6, 1e-3, 3e-3]},
        "synch": True,  # or one trial may be at its end before the other has begun
    }
    config = SweepConfig(
        space={path: {"grid": [1e-6, 3e-3]}},
        objective="val/logratio/margin",
        samples=1,
        search="grid",
        scheduler={"class_path": "pbt", "init_args": given},
        concurrency=2,
        seed=1,
        **{
            **settings(project, overrides={"trainer.max_epochs": 3, "trainer.val_check_interval": 1}),
            "storage": str(tmp_path),
        },
    )
    result = sweep(config, verbose=False)
    assert [trial.status for trial in result.trials] == ["finished"] * 2
    for trial in result.trials:
        assert trial.step == trial.total_steps == 18
    slow = min(result.trials, key=lambda trial: trial.id)  # the first of the grid
    # Without the other's weights, eighteen steps of a millionth would leave it where it was.
    assert slow.starts > 1
    assert slow.metrics["val/logratio/margin"] > 1
    assert any(entry["train/lr"] > 1e-4 for entry in slow.history)
    left = list(Path(result.location).glob("ray/*/checkpoint_*"))
    assert len(left) <= 2 * (given["perturbation_interval"] + 2)
    assert (Path(result.model) / "config.json").is_file()
