"""Completions of trials: their KL, also where the reference is a cache without a model, and their judge."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_dpo.evaluation import CompletionMonitor
from lightning_dpo.tuning.objective import SCORE, WIN_RATE
from lightning_dpo.tuning.trial.outcomes import OutcomeRecorder, prompt_keys

__all__ = ["KLMonitor"]


class KLMonitor(CompletionMonitor):
    """A `CompletionMonitor` that keeps a reference model of its own where the module has none.

    Completions of the policy are new in every trial: no cache can hold their log-probabilities.
    """

    def __init__(self, num_prompts: int, *, outcomes: OutcomeRecorder | None = None, **kwargs: Any) -> None:
        """Say how much to sample.

        Args:
            num_prompts: Validation prompts, of each rank.
            outcomes: Keeps what the judge says of each prompt, if that is what trials are ranked by.
            kwargs: For `CompletionMonitor`.
        """
        super().__init__(num_prompts, **kwargs)
        self._outcomes = outcomes
        self._own: nn.Module | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ask the module for its reference's model, before a checkpoint or a step changes the policy."""
        start: Any = getattr(pl_module, "start_reference", None)
        if stage == "fit" and start is not None:
            self._own = start()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample, measure and log, and hand on what the judge said."""
        super().on_validation_epoch_end(trainer, pl_module)
        if self._outcomes is None:
            return
        for metric, name in ((SCORE, "policy_score"), (WIN_RATE, "win")):
            values = [verdict.get(name) for _, verdict in self.verdicts]
            if values and None not in values:
                keys = prompt_keys(sample.prompt_ids for sample, _ in self.verdicts)
                self._outcomes.take(metric, keys=keys, values=torch.tensor(values, dtype=torch.float64))

    def reference(self, module: Any) -> nn.Module | None:
        """The model that the KL is measured to."""
        return super().reference(module) if self._own is None else self._own.to(module.device)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the model go."""
        self._own = None
