"""The recipe's loggers within trials: each trial is a run of its own, with its name, group and parameters."""

from __future__ import annotations

import csv
import struct
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import Logger
from sweep_project import settings

from lightning_dpo.tuning import SweepConfig
from lightning_dpo.tuning.recipe.trial_loggers import TrialRun, end_runs, name_runs
from lightning_dpo.tuning.trial.status import StoppedError

BETAS = {"t1": 0.1, "t2": 0.4}
QUIET = {
    "max_steps": 2,
    "val_check_interval": 2,
    "accelerator": "cpu",
    "devices": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "logger": False,
}


def train_two(project: Path, logger: Any) -> None:
    """Two trials, one after the other in one process, as a sweep runs them."""
    config = SweepConfig(
        space={"model.loss.beta": 1}, **settings(project, overrides={"trainer.logger": logger})
    )
    recipe = config.to_recipe()
    for trial, beta in BETAS.items():
        values = {"model.loss.beta": beta}
        cli = recipe.instantiate(
            values, trainer_options=QUIET, run=TrialRun(trial, "sweep7", values, 0, ("val/rewards/accuracy",))
        )
        try:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        finally:
            end_runs(cli.trainer)


class EndOf(Logger):
    """A logger that remembers how its runs ended."""

    ends: ClassVar[list[str]] = []
    name = version = "a"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Keep nothing."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Keep nothing."""

    def finalize(self, status: str) -> None:
        """Remember the end."""
        self.ends.append(status)


class Raises(pl.Callback):
    """Ends training at its first step."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def on_train_batch_start(self, *_: Any) -> None:
        """Raise."""
        raise self._error


def named(kind: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lightning.pytorch.loggers.{kind}", "init_args": arguments}


def test_csv_has_a_folder_for_each_trial(project: Path, tmp_path: Path) -> None:
    train_two(project, [named("CSVLogger", save_dir=str(tmp_path))])
    for trial, beta in BETAS.items():
        folder = tmp_path / "sweep7" / trial
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        assert any(row.get("val/rewards/accuracy") for row in rows)
        assert any(row.get("train/loss") for row in rows)
        assert yaml.safe_load((folder / "hparams.yaml").read_text())["model.loss.beta"] == beta


def test_a_trial_that_goes_on_keeps_what_it_logged_before() -> None:
    entry = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args={"save_dir": "x"})
    name_runs([entry, None, True], TrialRun("t1", "sweep7", {}, begins_at=40))
    assert entry.init_args == {"save_dir": "x", "name": "sweep7", "version": "t1-from-40"}


@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
def test_a_name_of_digits_stays_a_name(project: Path, tmp_path: Path, kind: str) -> None:
    logger = named(kind, save_dir=str(tmp_path))
    config = SweepConfig(
        space={"model.loss.beta": 1}, **settings(project, overrides={"trainer.logger": logger})
    )
    run = TrialRun("31479_00000", "sweep7")
    cli = config.to_recipe().instantiate({}, trainer_options=QUIET, run=run)
    # As an int it would be the folder version_3147900000.
    assert Path(cli.trainer.logger.log_dir).name == "trial-31479_00000"


def test_a_rerun_says_which_trial_it_runs_again() -> None:
    entry = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args={"save_dir": "x"})
    run = TrialRun("t9", "sweep7", {"beta": 1}, rerun_of="t1", purpose="repeat")
    name_runs(entry, run)
    assert entry.init_args["version"] == "t9-repeat-of-t1"
    assert run.logged == {"beta": 1, "rerun_of": "t1", "purpose": "repeat"}


def test_a_name_that_the_user_gave_stays(project: Path, tmp_path: Path) -> None:
    train_two(project, named("CSVLogger", save_dir=str(tmp_path), name="mine"))
    assert (tmp_path / "mine" / "t1" / "metrics.csv").is_file()


def test_tensorboard_has_a_run_for_each_trial(project: Path, tmp_path: Path) -> None:
    train_two(project, [named("TensorBoardLogger", save_dir=str(tmp_path))])
    for trial, beta in BETAS.items():
        events = [event for file in (tmp_path / "sweep7" / trial).glob("events*") for event in _events(file)]
        tags = {value.tag for event in events for value in event.summary.value}
        assert {"val/rewards/accuracy", "train/loss"} <= tags
        # The first value of a metric is the first one measured; Lightning's own hp_metric would be -1.
        assert "hp_metric" not in tags
        described = [
            value.metadata.plugin_data.content
            for event in events
            for value in event.summary.value
            if value.metadata.plugin_data.plugin_name == "hparams"
        ]
        # TensorBoard's table has these parameters and metrics as columns.
        assert any(b"val/rewards/accuracy" in content for content in described)
        assert sum(b"model.loss.beta" in content for content in described) == 2
        assert (
            yaml.safe_load((tmp_path / "sweep7" / trial / "hparams.yaml").read_text())["model.loss.beta"]
            == beta
        )


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StoppedError(), "success"),
        (SystemExit(0), "success"),  # as Ray ends a trial that its scheduler has stopped
        (SystemExit(1), "failed"),
        (ValueError("no"), "failed"),
    ],
)
def test_a_trial_that_is_stopped_early_has_not_failed(
    project: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, told: str
) -> None:
    monkeypatch.setattr(EndOf, "ends", [])
    config = SweepConfig(
        space={"model.loss.beta": 1},
        **settings(project, overrides={"trainer.logger": {"class_path": f"{__name__}.EndOf"}}),
    )
    cli = config.to_recipe().instantiate(
        {}, callbacks=[Raises(error)], trainer_options=QUIET, run=TrialRun("t", "s", {})
    )
    with pytest.raises(type(error)):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert EndOf.ends == [told]


def test_mlflow_has_a_run_for_each_trial(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = f"file:{tmp_path / 'runs'}"
    train_two(project, [named("MLFlowLogger", tracking_uri=store)])
    client = mlflow.tracking.MlflowClient(store)
    experiment = client.get_experiment_by_name("sweep7")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == set(BETAS)
    for trial, beta in BETAS.items():
        run = runs[trial]
        assert run.data.tags["sweep"] == "sweep7"
        assert float(run.data.params["model.loss.beta"]) == beta
        assert "val/rewards/accuracy" in run.data.metrics
        assert run.info.status == "FINISHED"


def test_wandb_offline_has_a_run_for_each_trial(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    started = []
    original = wandb.init

    def init(**arguments: Any) -> Any:
        started.append(arguments)
        return original(**arguments)

    monkeypatch.setattr(wandb, "init", init)
    train_two(project, [named("WandbLogger", save_dir=str(tmp_path), project="p", offline=True)])
    assert [(one["name"], one["group"], one["id"]) for one in started] == [
        ("t1", "sweep7", "sweep7-t1"),
        ("t2", "sweep7", "sweep7-t2"),
    ]
    folders = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert [name.rpartition("-")[2] for name in folders] == ["t1", "t2"]


@pytest.mark.parametrize("logger", [None, True, False])
def test_without_a_logger_by_name_nothing_is_written(project: Path, tmp_path: Path, logger: Any) -> None:
    config = SweepConfig(
        space={"model.loss.beta": 1}, **settings(project, overrides={"trainer.logger": logger})
    )
    cli = config.to_recipe().instantiate({}, trainer_options=QUIET, run=TrialRun("t", "s", {}))
    assert cli.trainer.loggers == []


def _events(file: Path) -> list[Any]:
    """The events of a TensorBoard file: each a length, its checksum, the event, its checksum."""
    from tensorboardX.proto import event_pb2

    content, events = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events
