"""The KL of trials that read their reference from a cache and so have no reference model."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_dpo.evaluation import CompletionMonitor
from lightning_dpo.training.dpo import DPOModule

__all__ = ["KLMonitor"]


class KLMonitor(CompletionMonitor):
    """A `CompletionMonitor` that keeps a reference model of its own where the module has none.

    Completions of the policy are new in every trial: no cache can hold their log-probabilities.
    """

    def __init__(self, num_prompts: int, **kwargs: Any) -> None:
        """See `CompletionMonitor`."""
        super().__init__(num_prompts, **kwargs)
        self._own: nn.Module | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the policy before a checkpoint or a step changes it, or load the other model that is meant."""
        if stage == "fit" and isinstance(pl_module, DPOModule):
            self._own = pl_module.start_reference()

    def reference(self, module: Any) -> nn.Module | None:
        """See `CompletionMonitor`."""
        if self._own is None:
            return super().reference(module)
        return self._own.to(module.device)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the copy go."""
        self._own = None
