"""The callback that reports a trial at each validation, and stops one that has diverged."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_dpo.files import write_file

__all__ = ["CHECKPOINT", "DivergedError", "TrialReport", "reference_passes", "saved_report"]

CHECKPOINT = "trial.ckpt"
"""Name of Lightning's checkpoint in the folder that is reported."""

PROGRESS = "progress.json"
"""Name of the file beside it with what was reported."""

_CHECK_EVERY = 10


class DivergedError(RuntimeError):
    """The loss or a metric is no longer a finite number."""


class TrialReport(pl.Callback):
    """Reports the metrics of each validation, in the middle of an epoch too, with a checkpoint.

    Attributes:
        reports: How many were sent.
        first_step_at: Time when the first batch began, seconds since 1970.
    """

    def __init__(
        self,
        report: Callable[[dict[str, Any], Path | None], None],
        *,
        required: tuple[str, ...],
        began: float,
    ) -> None:
        """Say where reports go.

        Args:
            report: Takes the metrics and the folder of the checkpoint.
            required: Metrics that must be among those that were logged.
            began: Since when the trial's start-up counts, seconds since 1970.
        """
        self._report = report
        self._required = required
        self._began = began
        self._is_finite: torch.Tensor | None = None
        self.reports = 0
        self.first_step_at: float | None = None

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
        if (
            loss is None
        ):  # a module that steps its optimizers itself, as PPO does, gives it to the loggers only
            loss = trainer.callback_metrics.get("train/loss")
        if isinstance(loss, torch.Tensor):
            finite = torch.isfinite(loss.detach()).all()
            self._is_finite = finite if self._is_finite is None else self._is_finite & finite
        if (batch_idx + 1) % _CHECK_EVERY == 0:
            self._check_loss(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the loss before time is spent on validation."""
        self._check_loss(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Send the validation's metrics, with a checkpoint.

        Raises:
            DivergedError: If a required metric is not finite.
            ValueError: If one was not logged.
        """
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        missing = [name for name in self._required if name not in metrics]
        if missing:
            raise ValueError(
                f"`objective` must be a metric that the module logs at validation, got {missing[0]!r}; "
                f"logged are {', '.join(sorted(metrics))}"
            )
        for name in self._required:
            if not math.isfinite(metrics[name]):
                raise DivergedError(f"{name} is {metrics[name]} at step {trainer.global_step}")
        metrics |= self._progress(trainer, pl_module)
        # Ranks that write a checkpoint together must write to one folder.
        with tempfile.TemporaryDirectory() as own:
            folder = Path(trainer.strategy.broadcast(own))
            trainer.save_checkpoint(folder / CHECKPOINT)
            if trainer.local_rank == 0:
                write_file(folder / PROGRESS, json.dumps(metrics))
            self._report(metrics, folder if trainer.local_rank == 0 else None)
            trainer.strategy.barrier()
        self.reports += 1

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


def reference_passes(module: Any) -> int:
    """Batches for which a module ran its reference; 0 where all came from a cache, or there is none."""
    return int(getattr(getattr(module, "reference", None), "passes", 0))


def saved_report(folder: Path) -> dict[str, Any]:
    """What was reported with a checkpoint.

    Args:
        folder: Folder of the checkpoint.
    """
    report: dict[str, Any] = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    return report


def _finite_steps(trainer: pl.Trainer) -> int:
    steps = trainer.estimated_stepping_batches
    return 0 if math.isinf(steps) else int(steps)
