"""The KL of trials that read their reference from a cache and so have no reference model."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_dpo.evaluation import CompletionMonitor
from lightning_dpo.models.build import build_reference
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
        source = getattr(pl_module, "_reference_source", None)
        if stage != "fit" or not isinstance(pl_module, DPOModule) or not isinstance(source, str):
            return
        if source.partition(":")[0] != "cached":
            return
        pl_module.configure_model()
        if hasattr(pl_module.policy, "disable_adapter"):
            return  # the policy with its adapter off is the reference
        other = source.partition(":")[2]
        if other:
            built = build_reference(other, policy=pl_module.policy, settings=pl_module._settings)
            self._own = built.model
        else:
            self._own = copy.deepcopy(pl_module.policy).eval().requires_grad_(False)

    def reference(self, module: DPOModule) -> nn.Module | None:
        """See `CompletionMonitor`."""
        if self._own is None:
            return super().reference(module)
        return self._own.to(module.device)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the copy go."""
        self._own = None
