"""The KL of trials that read their reference from a cache and so have no reference model."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_dpo.evaluation import CompletionMonitor

__all__ = ["KLMonitor"]


class KLMonitor(CompletionMonitor):
    """A `CompletionMonitor` that keeps a reference model of its own where the module has none.

    Completions of the policy are new in every trial: no cache can hold their log-probabilities.
    """

    def __init__(self, num_prompts: int, **kwargs: Any) -> None:
        """Say how much to sample.

        Args:
            num_prompts: Validation prompts, of each rank.
            kwargs: For `CompletionMonitor`.
        """
        super().__init__(num_prompts, **kwargs)
        self._own: nn.Module | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ask the module for its reference's model, before a checkpoint or a step changes the policy."""
        start: Any = getattr(pl_module, "start_reference", None)
        if stage == "fit" and start is not None:
            self._own = start()

    def reference(self, module: Any) -> nn.Module | None:
        """The model that the KL is measured to."""
        return super().reference(module) if self._own is None else self._own.to(module.device)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the model go."""
        self._own = None
