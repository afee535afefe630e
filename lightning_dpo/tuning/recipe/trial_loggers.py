"""The recipe's loggers within a trial: each trial is a run of its own, named after it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_dpo.tuning.config_paths import import_object
from lightning_dpo.tuning.trial.status import StoppedError

__all__ = ["LogParameters", "TrialRun", "end_runs", "name_runs", "named_loggers"]

_FOLDER_NAME = "lightning_logs"
"""Lightning's default, which a user did not choose."""


@dataclass(frozen=True, slots=True)
class TrialRun:
    """What a logger's run of a trial is called, and what it says of the trial.

    Attributes:
        trial: The trial's name.
        group: The sweep's name.
        parameters: The trial's values by config path.
        begins_at: Optimizer steps of the checkpoint that a trial goes on from; 0 for a new one.
        metrics: The metrics that the sweep looks at, by their logged names.
        rerun_of: The trial whose values it runs with another seed; empty for a trial of the search.
        purpose: "repeat" or "confirm" then.
    """

    trial: str
    group: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    begins_at: int = 0
    metrics: tuple[str, ...] = ()
    rerun_of: str = ""
    purpose: str = ""

    @property
    def name(self) -> str:
        """The trial's name, which for a rerun says what it runs again: Ray's own name for it does not."""
        return f"{self.trial}-{self.purpose}-of-{self.rerun_of}" if self.rerun_of else _as_text(self.trial)

    @property
    def logged(self) -> dict[str, Any]:
        """The trial's values, and for a rerun the trial that it runs again, to group runs by."""
        rerun = {"rerun_of": self.rerun_of, "purpose": self.purpose} if self.rerun_of else {}
        return {**self.parameters, **rerun}

    @property
    def version(self) -> str:
        """Name of the trial's folder: of its own where it goes on, since loggers write over what is there."""
        return f"{self.name}-from-{self.begins_at}" if self.begins_at else self.name


def _as_text(trial: str) -> str:
    """A trial's name that no parser takes for a number, as it would take 31479_00000, one of Ray's."""
    try:
        float(trial)
    except ValueError:
        return trial
    return f"trial-{trial}"


def name_runs(loggers: Any, run: TrialRun) -> None:
    """Give the loggers of a parsed recipe the names of a trial, before they are made.

    Folders (TensorBoard, CSV) are NAME/VERSION, with the sweep and the trial in these places. W&B gets a run
    of the trial's name in a group of the sweep's, MLflow a run of the trial's name with the sweep as a tag.
    Other loggers get what of `name`, `version`, `run_name` and `group` their class takes.

    Args:
        loggers: What stands at `trainer.logger`: one logger's class and arguments, several, or no class.
        run: Names.
    """
    entries = loggers if isinstance(loggers, list) else [loggers]
    for entry in entries:
        path = getattr(entry, "class_path", None)
        arguments = getattr(entry, "init_args", None)
        if path is None or arguments is None:  # a class of no arguments can be given no name
            continue
        accepted = set(inspect.signature(import_object(path)).parameters)
        kind = path.rpartition(".")[2]
        if kind == "WandbLogger":
            # The id names the run for good, so that a trial that starts again goes on with it.
            names: dict[str, Any] = {"name": run.name, "id": f"{run.group}-{run.trial}"}
            entry.dict_kwargs = {**(getattr(entry, "dict_kwargs", None) or {}), "group": run.group}
        elif kind == "MLFlowLogger":
            tags = {**(arguments.get("tags") or {}), "sweep": run.group, "trial": _as_text(run.trial)}
            names = {"run_name": run.name, "tags": tags}
            if arguments.get("experiment_name") in (None, _FOLDER_NAME):
                names["experiment_name"] = run.group
        else:
            names = {"version": run.version, "run_name": run.name, "group": run.group}
            if arguments.get("name") in (None, _FOLDER_NAME):
                names["name"] = run.group
        if kind == "TensorBoardLogger":
            # It is -1 in every run; the trial's own metrics take its place.
            names["default_hp_metric"] = False
        for name, value in names.items():
            if name in accepted:
                arguments[name] = value


def named_loggers(configured: Any) -> list[Logger]:
    """The loggers that a recipe names; True and None, which let Lightning choose, are none.

    Args:
        configured: What stands at `trainer.logger`, made.
    """
    entries = configured if isinstance(configured, list) else [configured]
    return [entry for entry in entries if isinstance(entry, Logger)]


class LogParameters(pl.Callback):
    """Tells the loggers a trial's values, and whether it was stopped early or went wrong."""

    def __init__(self, run: TrialRun) -> None:
        """Say what is logged."""
        self._run = run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Log the values, once it is known which rank this is: only the first one logs."""
        for logger in trainer.loggers:
            logger.log_hyperparams(self._run.logged)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                _describe_run(logger, self._run)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Keep Lightning from telling the loggers that a trial failed which a scheduler has stopped."""
        # Ray ends a trial with code 0.
        is_ended = isinstance(exception, SystemExit) and exception.code in (0, None)
        if is_ended or isinstance(exception, StoppedError):
            for logger in trainer.loggers:
                logger.finalize = partial(_finalize_as_success, logger.finalize)  # type: ignore[method-assign]


def _finalize_as_success(finalize: Callable[[str], None], status: str) -> None:
    finalize("success")


def _describe_run(logger: TensorBoardLogger, run: TrialRun) -> None:
    """Name parameters and metrics for TensorBoard's table of runs, which takes the metrics' last values.

    Lightning would log a first value of each metric with them.
    """
    writer = logger.experiment
    summary = import_module(f"{type(writer).__module__.rpartition('.')[0]}.summary")
    values = {
        path: value if isinstance(value, bool | int | float | str) else str(value)
        for path, value in run.logged.items()
    }
    for part in summary.hparams(values, dict.fromkeys(run.metrics, 0.0)):
        writer._get_file_writer().add_summary(part)


def end_runs(trainer: pl.Trainer) -> None:
    """End what a logger would carry over into the next trial of this process.

    Args:
        trainer: Of the trial that has ended.
    """
    if any(type(logger).__name__ == "WandbLogger" for logger in trainer.loggers):
        wandb = sys.modules.get("wandb")
        if wandb is not None:
            wandb.finish()  # or the next trial's logger would go on with this run
