"""The callback that reports a trial at each validation, and stops one that has diverged."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_dpo.tuning.trial.best_step import BestStep, KeptStep, ranking_half
from lightning_dpo.tuning.trial.checkpoints import SavedFolder, TrialCheckpoints
from lightning_dpo.tuning.trial.outcomes import OutcomeRecorder

__all__ = ["DivergedError", "Saved", "TrialReport", "reference_passes", "steps_between_validations"]

_CHECK_EVERY = 10
_LOSS = "val/loss"
_PACKAGE = f"{__name__.partition('.')[0]}."


class DivergedError(RuntimeError):
    """The loss or a metric is no longer a finite number."""


class Saved(NamedTuple):
    """What stands on disk as a report is sent.

    Attributes:
        folder: The report's checkpoint; None where none is written.
        kept: The best step so far, where the best one is kept.
    """

    folder: SavedFolder | None = None
    kept: KeptStep | None = None


class TrialReport(pl.Callback):
    """Reports the metrics of each validation, in the middle of an epoch too, with a checkpoint.

    A report is sent when its checkpoint is whole, and training goes on until then: a scheduler that stops the
    trial, or whatever ends its process, finds the weights of what was reported. It is sent at the latest
    before the next one, and at the end.

    Attributes:
        reports: How many were sent.
        first_step_at: Time when the first batch began, seconds since 1970.
    """

    def __init__(
        self,
        report: Callable[[dict[str, Any], Saved], None],
        *,
        required: tuple[str, ...],
        began: float,
        checkpoints: TrialCheckpoints | None = None,
        best: BestStep | None = None,
        outcomes: OutcomeRecorder | None = None,
    ) -> None:
        """Say where reports go.

        Args:
            report: Takes the metrics, and what was saved with them.
            required: Metrics that must be among those that were logged.
            began: Since when the trial's start-up counts, seconds since 1970.
            checkpoints: Writes checkpoints; None writes none.
            best: Finds the best step, where its weights are to be kept.
            outcomes: Says what validations find for each pair, and so what is best; a callback before this.
        """
        self._report = report
        self._required = required
        self._began = began
        self._checkpoints = checkpoints
        self._best = best
        self._outcomes = outcomes
        self._pending: tuple[dict[str, Any], Saved] | None = None
        self._is_finite: torch.Tensor | None = None
        self.reports = 0
        self.first_step_at: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let training log only what a report takes, where nobody else reads it."""
        own = all(type(each).__module__.startswith(_PACKAGE) for each in trainer.callbacks)  # type: ignore[attr-defined]
        if own and not trainer.loggers:
            pl_module.logs_every = steps_between_validations(trainer)  # type: ignore[assignment]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note when training begins."""
        if self.first_step_at is None:
            self.first_step_at = time.time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Watch the loss; it is looked at now and then only, since that waits for the GPU.

        Raises:
            DivergedError: If it was not finite.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None:
            # A module that steps its optimizers itself, as PPO does, gives it to the loggers only.
            loss = trainer.callback_metrics.get("train/loss")
        if isinstance(loss, torch.Tensor):
            finite = torch.isfinite(loss.detach()).all()
            self._is_finite = finite if self._is_finite is None else self._is_finite & finite
        if (batch_idx + 1) % _CHECK_EVERY == 0:
            self._check_loss(trainer)
        self._send(trainer, if_whole=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the loss before time is spent on validation."""
        self._check_loss(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the validation's metrics, and begin to write a checkpoint.

        Raises:
            DivergedError: If a required metric, or the loss, is not finite.
            OSError: If this checkpoint or the one before cannot be written.
            ValueError: If a required metric was not logged.
        """
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._send(trainer)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        missing = [name for name in self._required if name not in metrics]
        if missing:
            raise ValueError(
                f"`objective` must be a metric that the module logs at validation, got {missing[0]!r}; "
                f"logged are {', '.join(sorted(metrics))}"
            )
        for name in (*self._required, _LOSS):
            if not math.isfinite(metrics.get(name, 0.0)):
                raise DivergedError(f"{name} is {metrics[name]} at step {trainer.global_step}")
        metrics |= self._progress(trainer, pl_module)
        self._pending = metrics, self._save(trainer, metrics)
        self._send(trainer, if_whole=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Send what is still to be sent.

        Raises:
            OSError: If its checkpoint cannot be written.
        """
        self._send(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Send what was found before training failed; of several ranks the others may not be there."""
        if isinstance(exception, Exception) and trainer.world_size == 1:
            with contextlib.suppress(Exception):  # it is the first error that is told
                self._send(trainer)

    def _save(self, trainer: pl.Trainer, metrics: dict[str, Any]) -> Saved:
        """Begin to write a checkpoint, and find out whether it is that of the best step."""
        best = self._best
        is_best = best is not None and self._is_best(best, trainer, metrics)
        kept = None if best is None else best.kept
        if self._checkpoints is None:
            return Saved(None, kept)
        # The best one's folder stays; where this is the best one, that is its own.
        stays = None if kept is None or is_best else SavedFolder.parse(kept.folder)
        is_last = 0 < metrics["total_steps"] <= metrics["step"]
        folder = self._checkpoints.save(trainer, metrics, is_last=is_last, kept=stays)
        if best is not None and kept is not None and is_best:
            best.kept = kept = replace(kept, folder=folder.name)
        return Saved(folder, kept)

    def _is_best(self, best: BestStep, trainer: pl.Trainer, metrics: dict[str, Any]) -> bool:
        found = None if self._outcomes is None else self._outcomes.latest

        def total(tensor: torch.Tensor) -> torch.Tensor:
            on_device = tensor.to(trainer.strategy.root_device)
            summed = trainer.strategy.reduce(on_device, reduce_op="sum")
            return torch.as_tensor(summed).cpu()

        is_best = best.consider(found, metrics, total=total)
        if is_best and found is not None and self._outcomes is not None:
            self._outcomes.keep(ranking_half(found), rank=trainer.global_rank)
        return is_best

    def _send(self, trainer: pl.Trainer, *, if_whole: bool = False) -> None:
        """Send the report that waits for its checkpoint.

        Args:
            trainer: Lightning's.
            if_whole: Leave it where the checkpoint is still being written, on any rank.

        Raises:
            OSError: If the checkpoint could not be written.
        """
        if self._pending is None:
            return
        if self._checkpoints is not None and if_whole and not self._is_whole(trainer, self._checkpoints):
            return
        (metrics, saved), self._pending = self._pending, None
        if self._checkpoints is not None:
            self._checkpoints.wait()
        self.reports += 1
        self._report(metrics, saved)
        if self._checkpoints is not None:
            self._checkpoints.remove_older()
        trainer.strategy.barrier("the report is sent")

    def _is_whole(self, trainer: pl.Trainer, checkpoints: TrialCheckpoints) -> bool:
        if trainer.world_size == 1:
            return checkpoints.is_done
        return bool(trainer.strategy.reduce_boolean_decision(checkpoints.is_done, all=True))

    def _progress(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        now = time.time()
        assert self.first_step_at is not None
        return {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "total_steps": _finite_steps(trainer),
            "seconds": round(now - self._began, 3),
            "startup_seconds": round(self.first_step_at - self._began, 3),
            "reference_passes": reference_passes(module),
        }

    def _check_loss(self, trainer: pl.Trainer) -> None:
        if self._is_finite is not None and not bool(self._is_finite):
            raise DivergedError(f"the training loss is not finite at step {trainer.global_step}")


def steps_between_validations(trainer: pl.Trainer) -> int:
    """A number of steps so that each validation comes after a multiple of it; 1 where no larger one is known.

    Args:
        trainer: Of a run that has begun.
    """
    epoch, between, accumulated = (
        trainer.num_training_batches,
        trainer.val_check_batch,
        trainer.accumulate_grad_batches,
    )
    if not (math.isfinite(epoch) and epoch and between and math.isfinite(between)):
        return 1
    if between == epoch:
        return math.ceil(epoch / accumulated)
    is_even = epoch % between == 0 and between % accumulated == 0
    return int(between) // accumulated if is_even else 1


def reference_passes(module: Any) -> int:
    """Batches for which a module ran its reference; 0 where all came from a cache, or there is none."""
    return int(getattr(getattr(module, "reference", None), "passes", 0))


def _finite_steps(trainer: pl.Trainer) -> int:
    steps = trainer.estimated_stepping_batches
    return 0 if math.isinf(steps) else int(steps)
