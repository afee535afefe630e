"""One training run of a trial, in this process, and what became of it."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from lightning_dpo.tuning.objective import Objective
from lightning_dpo.tuning.recipe import Recipe
from lightning_dpo.tuning.search.space import SearchSpace
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.report_callback import CHECKPOINT, DivergedError, TrialReport

__all__ = ["Outcome", "TrialPlan", "fit_once", "fit_trial", "here", "tokenise", "users_place"]


@dataclass(frozen=True)
class TrialPlan:
    """What every trial of a sweep needs to know; sent to all machines once.

    Attributes:
        recipe: What to train.
        space: How Ray's config becomes overrides.
        objective: Metrics that each report must have.
        location: The sweep's folder.
        cwd: Relative paths of the recipe start here.
        import_path: Where the user's own classes are found.
        workers: Processes of a trial.
        cpus: CPUs of each.
        gpus: GPUs of each.
        strategy: How several workers share a model.
        retries: After the loss of a worker, where there are several.
        kl_prompts: Prompts to sample completions for.
        kl_tokens: Longest of these.
        prepared: Overrides that preparation found, such as the shared reference.
    """

    recipe: Recipe
    space: SearchSpace
    objective: Objective
    location: str
    cwd: str
    import_path: tuple[str, ...] = ()
    workers: int = 1
    cpus: float = 1
    gpus: float = 0
    strategy: str = "ddp"
    retries: int = 0
    kl_prompts: int = 0
    kl_tokens: int = 64
    prepared: Mapping[str, Any] = field(default_factory=dict)

    @property
    def records(self) -> Storage:
        """Folder of what trials write about themselves."""
        return Storage(f"{self.location}/trials")


class Outcome(NamedTuple):
    """How a training run ended.

    Attributes:
        status: As `TrialRecord` has it.
        reason: In words, where something went wrong.
        details: The traceback, likewise.
    """

    status: str
    reason: str = ""
    details: str = ""


_previous_end: float | None = None
"""When the trial before this one in the same process ended."""


def fit_trial(
    plan: TrialPlan,
    overrides: Mapping[str, Any],
    send: Callable[[dict[str, Any], Path | None], None],
    *,
    checkpoint: Path | None = None,
    trainer_options: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train with a trial's values, from a checkpoint where there is one.

    What goes wrong in training is returned and not raised: Ray would start the trial again, and it would go
    wrong again. The end of the process is for Ray to see.

    Args:
        plan: The sweep.
        overrides: The trial's values by config path.
        send: Takes each report.
        checkpoint: Folder that an earlier process of this trial reported, or another trial with PBT.
        trainer_options: Take the place of the recipe's trainer arguments.
    """
    global _previous_end
    began = _previous_end or time.time()
    report = TrialReport(send, required=tuple(g.metric for g in plan.objective.goals), began=began)
    try:
        with users_place(plan), _own_memory(), tempfile.TemporaryDirectory() as scratch:
            options = {**_QUIET, "default_root_dir": scratch, **(trainer_options or {})}
            _fit(plan, overrides, report, checkpoint, options)
            if not report.reports and checkpoint is None:
                raise ValueError(
                    "a trial must validate at least once: give the recipe validation data, and a "
                    "`trainer.val_check_interval` within its length"
                )
    except DivergedError as error:
        return Outcome("diverged", str(error))
    except Exception as error:  # whatever it is, the other trials go on
        status = "out of memory" if _is_out_of_memory(error) else "failed"
        return Outcome(status, f"{type(error).__name__}: {error}", traceback.format_exc())
    finally:
        _previous_end = time.time()
    return Outcome("finished")


def fit_once(
    plan: TrialPlan, trainer_options: Mapping[str, Any], *, callbacks: Sequence[pl.Callback] = ()
) -> tuple[str, ...]:
    """Run the recipe as it is, apart from these trainer arguments; returns the names that it logged."""
    with users_place(plan), _own_memory():
        options = {**_QUIET, **here(plan), **trainer_options}
        cli = plan.recipe.cli(plan.prepared, callbacks=callbacks, trainer_options=options)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        return tuple(cli.trainer.callback_metrics)


def tokenise(plan: TrialPlan) -> None:
    """Prepare the recipe's data, and nothing else."""
    with users_place(plan):
        cli = plan.recipe.cli(plan.prepared, trainer_options={**_QUIET, **here(plan)})
        cli.datamodule.prepare_data()


def here(plan: TrialPlan) -> dict[str, Any]:
    """Trainer arguments for one process on what Ray gave it."""
    return {"devices": 1, "num_nodes": 1, **({"accelerator": "cpu"} if plan.gpus == 0 else {})}


_QUIET: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "logger": False,
    "default_root_dir": tempfile.gettempdir(),
}
"""A trial leaves no files but the sweep's."""


def _fit(
    plan: TrialPlan,
    overrides: Mapping[str, Any],
    report: TrialReport,
    checkpoint: Path | None,
    trainer_options: dict[str, Any],
) -> None:
    callbacks: list[pl.Callback] = [report]
    if plan.kl_prompts and plan.recipe.is_preference:
        from lightning_dpo.tuning.trial.kl import KLMonitor

        callbacks.insert(0, KLMonitor(plan.kl_prompts, max_new_tokens=plan.kl_tokens))
    if checkpoint is not None:
        callbacks.append(_TakeOverSettings())
    cli = plan.recipe.cli(
        {**overrides, **plan.prepared}, callbacks=callbacks, trainer_options=trainer_options
    )
    cli.trainer.fit(
        cli.model,
        datamodule=cli.datamodule,
        ckpt_path=None if checkpoint is None else str(checkpoint / CHECKPOINT),
        weights_only=False,
    )


class _TakeOverSettings(pl.Callback):
    """Gives a resumed optimizer the trial's own learning rate: with PBT the checkpoint is another trial's."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scale the rates of optimizer and scheduler to what the trial's own configuration gives."""
        fresh = _configured(pl_module.configure_optimizers())
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


def _configured(result: Any) -> list[torch.optim.Optimizer]:
    """The optimizers among the forms that `configure_optimizers` may return."""
    if isinstance(result, torch.optim.Optimizer):
        return [result]
    if isinstance(result, Mapping):
        return [result["optimizer"]]
    found = result[0] if isinstance(result, tuple) and isinstance(result[0], list) else result or []
    return [entry["optimizer"] if isinstance(entry, Mapping) else entry for entry in found]


@contextlib.contextmanager
def users_place(plan: TrialPlan) -> Iterator[None]:
    """The user's working directory, where this machine has it, and import path."""
    before = Path.cwd()
    sys.path.extend(entry for entry in plan.import_path if entry not in sys.path)
    if Path(plan.cwd).is_dir():
        os.chdir(plan.cwd)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _own_memory() -> Iterator[None]:
    """Give everything back at the end, also when a scheduler stops the trial: the process may go on."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "memory" in str(error) and "alloc" in str(error)
    )
