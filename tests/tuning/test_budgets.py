"""Sweeps with the user's own loggers and callbacks, with limits, and with trials that all fail alike."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from ray import tune
from sweep_faults import BROKEN
from sweep_project import settings

from lightning_dpo.tuning import SweepConfig, sweep

pytestmark = pytest.mark.heavy


class Witness(tune.Callback):
    """Writes down how many results it saw."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_trial_result(self, *_: object, **info: object) -> None:
        with Path(self.file).open("a") as file:
            file.write("x")


def test_loggers_callbacks_and_a_limit_of_steps(cluster: None, project: Path, tmp_path: Path) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    config = SweepConfig(
        space={"model.loss.beta": {"grid": [0.05, 0.2]}},
        samples=1,
        search="grid",
        stop={"steps": 4},
        callbacks=[
            {"class_path": f"{__name__}.Witness", "init_args": {"file": str(tmp_path / "seen")}},
            "ray.tune.logger.JsonLoggerCallback",
        ],
        name="watched",
        export=False,
        **settings(project, overrides={"trainer.logger": [logger], "model.optimizer.lr": 1e-3}),
    )
    result = sweep(config, verbose=False)
    assert [(trial.step, trial.status) for trial in result.trials] == [(4, "stopped")] * 2
    # The best is one that was stopped too, so others that were stopped may be recommended.
    assert len(result.comparisons) == 2
    for trial in result.trials:
        rows = list(csv.DictReader((tmp_path / "watched" / trial.id / "metrics.csv").open()))
        logged = [float(row["val/rewards/accuracy"]) for row in rows if row.get("val/rewards/accuracy")]
        assert logged == [entry["val/rewards/accuracy"] for entry in trial.history]
    assert (tmp_path / "seen").read_text() == "xxxx"
    assert len(list(Path(result.location, "ray").glob("*/result.json"))) == 2


def test_what_a_limit_of_steps_ended_is_confirmed(cluster: None, project: Path) -> None:
    config = SweepConfig(
        space={"model.loss.beta": {"grid": [0.05, 0.2]}},
        samples=1,
        search="grid",
        stop={"steps": 4},
        confirm=1,
        confirm_seeds=2,
        name="limited",
        export=False,
        **settings(project),
    )
    result = sweep(config, verbose=False)
    assert [(run.purpose, run.step, run.status) for run in result.reruns] == [("confirm", 4, "stopped")] * 2
    assert result.mean(result.best).runs == 2
    assert {run.rerun_of for run in result.reruns} == {result.best.id}


def test_the_first_trials_failing_alike_end_the_sweep(cluster: None, project: Path, tmp_path: Path) -> None:
    trouble = {"class_path": "sweep_faults.Trouble", "init_args": {"marker": str(tmp_path / "killed")}}
    config = SweepConfig(
        space={"model.loss.beta": BROKEN, "model.optimizer.lr": {"loguniform": [1e-4, 1e-2]}},
        samples=8,
        concurrency=1,
        fail_fast=2,
        name="alike",
        **settings(project, overrides={"trainer.callbacks": [trouble], "trainer.val_check_interval": 6}),
    )
    with pytest.raises(ValueError, match="a mistake of one's own"):
        sweep(config, verbose=False)
    statuses = json.loads((project / "sweeps/alike/sweep.json").read_text())["statuses"]
    assert len([status for status, *_ in statuses.values() if status == "failed"]) in (2, 3)


def test_a_budget_of_time_ends_the_trials(cluster: None, project: Path) -> None:
    slow = {"class_path": "sweep_faults.Slow", "init_args": {"seconds": 0.5}}
    endless = {"trainer.callbacks": [slow], "trainer.max_epochs": 100_000}
    config = SweepConfig(
        space={"model.loss.beta": {"grid": [0.05, 0.1, 0.2]}},
        samples=1,
        search="grid",
        concurrency=1,
        time_budget=60,
        confirm=1,
        name="budget",
        export=False,
        **settings(project, overrides=endless),
    )
    result = sweep(config, verbose=False)
    # One trial ran when the time was over; the others never began, and none ran to its end to be confirmed.
    (trial,) = result.trials
    assert trial.status == "stopped"
    assert trial.is_ranked
    assert result.reruns == ()
