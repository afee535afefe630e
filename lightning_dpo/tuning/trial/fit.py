"""One training run of a trial, in this process, and what became of it."""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_dpo.tuning.cluster.resources import Resources
from lightning_dpo.tuning.recipe.judge import make_judge
from lightning_dpo.tuning.recipe.trial_loggers import TrialRun, end_runs
from lightning_dpo.tuning.trial.best_step import BestStep, KeptStep
from lightning_dpo.tuning.trial.checkpoints import CHECKPOINT, TrialCheckpoints, saved_report
from lightning_dpo.tuning.trial.ending import Outcome
from lightning_dpo.tuning.trial.kl import KLMonitor
from lightning_dpo.tuning.trial.outcomes import OutcomeRecorder
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.report_callback import DivergedError, Saved, TrialReport
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.trial.status import TrialStatus

__all__ = ["fit_recipe", "fit_trial", "local_trainer_options", "tokenise"]

_WITHOUT_FILES: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "logger": False,
    "default_root_dir": tempfile.gettempdir(),
}
"""Trainer arguments of a trial, which leaves no files but the sweep's and shows nothing."""

_previous_end: float | None = None
"""When the trial before this one in the same process ended."""


def fit_trial(
    spec: TrialSpec,
    overrides: Mapping[str, Any],
    report: Callable[[dict[str, Any], Saved], None],
    *,
    trial: str,
    starts: int = 1,
    kept: KeptStep | None = None,
    checkpoint: Path | None = None,
    trainer_options: Mapping[str, Any] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    is_alone: bool = True,
) -> Outcome:
    """Train with a trial's values, from a checkpoint where there is one.

    What goes wrong in training is returned and not raised: Ray would start the trial again, and it would go
    wrong again. The end of the process is for Ray to see.

    Args:
        spec: What the sweep's trials have in common.
        overrides: The trial's values by config path.
        report: Takes the metrics of each validation, and what was saved with them.
        trial: The trial's name.
        starts: How often it was started, this time counted.
        kept: The best step of an earlier start, where the best one is kept.
        checkpoint: Folder with a full state of an earlier process of this trial, or with PBT of another one.
        trainer_options: Take the place of the recipe's trainer arguments.
        callbacks: Added after the trial's own.
        is_alone: Whether no other trial runs in this process, so that its start-up counts from the end of the
            one before.
    """
    global _previous_end
    began = (_previous_end if is_alone else None) or time.time()
    options = trainer_options or {}
    try:
        return _outcome(
            spec, overrides, report, trial, starts, kept, checkpoint, options, list(callbacks), began
        )
    finally:
        # Only here is all gone that holds the model: callbacks, and an error whose traceback has its frames.
        _give_memory_back()
        _previous_end = time.time()


def fit_recipe(
    spec: TrialSpec, trainer_options: Mapping[str, Any], *, callbacks: Sequence[pl.Callback] = ()
) -> tuple[str, ...]:
    """Run the recipe as it is, apart from some trainer arguments, outside of any trial.

    Args:
        spec: What the sweep's trials have in common.
        trainer_options: Take the place of the recipe's trainer arguments.
        callbacks: Added to the trainer's.

    Returns:
        The names of what it logged.
    """
    with spec.user_environment(), _memory_given_back():
        options = {**_WITHOUT_FILES, **local_trainer_options(spec.resources), **trainer_options}
        cli = spec.recipe.instantiate(spec.prepared, callbacks=callbacks, trainer_options=options)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        return tuple(cli.trainer.callback_metrics)


def tokenise(spec: TrialSpec) -> None:
    """Prepare the recipe's data, and nothing else."""
    with spec.user_environment():
        options = {**_WITHOUT_FILES, **local_trainer_options(spec.resources)}
        spec.recipe.instantiate(spec.prepared, trainer_options=options).datamodule.prepare_data()


def local_trainer_options(resources: Resources) -> dict[str, Any]:
    """Trainer arguments of one process, on what Ray gave it."""
    return {"devices": 1, "num_nodes": 1, **({} if resources.gpus else {"accelerator": "cpu"})}


def _outcome(
    spec: TrialSpec,
    overrides: Mapping[str, Any],
    report: Callable[[dict[str, Any], Saved], None],
    trial: str,
    starts: int,
    kept: KeptStep | None,
    checkpoint: Path | None,
    trainer_options: Mapping[str, Any],
    callbacks: list[pl.Callback],
    began: float,
) -> Outcome:
    """Train, and say what became of it; an error of training is an outcome."""
    checkpoints = TrialCheckpoints(spec.checkpoints, trial, starts=starts, plan=spec.checkpoint_plan)
    outcomes = OutcomeRecorder(spec.outcomes, trial=trial, metric=spec.objective.primary.metric)
    reports = TrialReport(
        report,
        required=tuple(goal.metric for goal in spec.objective.goals),
        began=began,
        checkpoints=checkpoints,
        best=BestStep(spec.objective.primary, kept=kept) if spec.keeps_best else None,
        outcomes=outcomes,
    )
    begins_at = 0 if checkpoint is None else int(saved_report(checkpoint)["step"])
    record = TrialRecord.load(spec.records, trial)
    run = TrialRun(
        trial,
        spec.location.rstrip("/").rpartition("/")[2],
        overrides,
        begins_at,
        spec.shown_metrics,
        rerun_of=record.rerun_of if record else "",
        purpose=record.purpose if record else "",
    )
    try:
        with (
            spec.user_environment(),
            tempfile.TemporaryDirectory() as scratch,
            contextlib.closing(checkpoints),
        ):
            options = {**_WITHOUT_FILES, "default_root_dir": scratch, **trainer_options}
            own = [*_monitors(spec, outcomes), outcomes, reports]
            _fit(spec, overrides, [*own, *callbacks], checkpoint, options, run)
            if not reports.reports and checkpoint is None:
                raise ValueError(
                    "a trial must validate at least once: give the recipe validation data, and a "
                    "`trainer.val_check_interval` within its length"
                )
    except DivergedError as error:
        return Outcome(TrialStatus.DIVERGED, str(error))
    except Exception as error:  # whatever it is, the other trials go on
        status = TrialStatus.OUT_OF_MEMORY if _is_out_of_memory(error) else TrialStatus.FAILED
        return Outcome(status, f"{type(error).__name__}: {error}", traceback.format_exc())
    return Outcome(TrialStatus.FINISHED)


def _fit(
    spec: TrialSpec,
    overrides: Mapping[str, Any],
    callbacks: list[pl.Callback],
    checkpoint: Path | None,
    trainer_options: dict[str, Any],
    run: TrialRun,
) -> None:
    if checkpoint is not None:
        callbacks.append(_UseOwnLearningRate())
    cli = spec.recipe.instantiate(
        {**overrides, **spec.prepared}, callbacks=callbacks, trainer_options=trainer_options, run=run
    )
    try:
        cli.trainer.fit(
            cli.model,
            datamodule=cli.datamodule,
            ckpt_path=None if checkpoint is None else str(checkpoint / CHECKPOINT),
            weights_only=False,
        )
    finally:
        end_runs(cli.trainer)
        cli.let_go()


def _monitors(spec: TrialSpec, outcomes: OutcomeRecorder) -> list[pl.Callback]:
    """What samples completions, where that is wanted, and judges them."""
    if not spec.measures_kl:
        return []
    judge = None if spec.judge is None else make_judge(spec.judge)
    return [KLMonitor(spec.kl_prompts, max_new_tokens=spec.kl_tokens, judge=judge, outcomes=outcomes)]


class _UseOwnLearningRate(pl.Callback):
    """Gives a resumed optimizer the trial's own learning rate: with PBT the checkpoint is another trial's."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scale the rates of optimizer and scheduler to what the trial's own configuration gives."""
        fresh = _optimizers(pl_module.configure_optimizers())
        for optimizer, own in zip(trainer.optimizers, fresh, strict=False):
            for group, wanted in zip(optimizer.param_groups, own.param_groups, strict=False):
                rate = wanted.get("initial_lr", wanted["lr"])
                known = group.get("initial_lr", group["lr"])
                if known and rate != known:
                    group["lr"] *= rate / known
                    group["initial_lr"] = rate
        for entry in trainer.lr_scheduler_configs:
            scheduler = entry.scheduler
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [g.get("initial_lr", g["lr"]) for g in scheduler.optimizer.param_groups]


def _optimizers(result: Any) -> list[torch.optim.Optimizer]:
    """The optimizers among the forms that `configure_optimizers` may return."""
    if isinstance(result, torch.optim.Optimizer):
        return [result]
    if isinstance(result, Mapping):
        return [result["optimizer"]]
    found = result[0] if isinstance(result, tuple) and isinstance(result[0], list) else result or []
    return [entry["optimizer"] if isinstance(entry, Mapping) else entry for entry in found]


@contextlib.contextmanager
def _memory_given_back() -> Iterator[None]:
    """Free memory at the end: the process may train another model."""
    try:
        yield
    finally:
        _give_memory_back()


def _give_memory_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "memory" in str(error) and "alloc" in str(error)
    )
