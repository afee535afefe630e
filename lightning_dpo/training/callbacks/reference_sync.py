"""TR-DPO: a reference that follows the policy (https://arxiv.org/abs/2404.09656)."""

from __future__ import annotations

from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from lightning_dpo.parallel import mix_weights
from lightning_dpo.reference.base import Reference
from lightning_dpo.types.checks import check_bounds

__all__ = ["ReferenceSync"]


class ReferencedPolicy(Protocol):
    """What the callback asks of a module.

    Attributes:
        policy: The model that trains.
        reference: Where reference log-probabilities come from.
    """

    policy: nn.Module
    reference: Reference


class ReferenceSync(pl.Callback):
    """Every few optimizer steps the reference becomes a mixture of the policy and itself.

    theta_ref <- alpha * theta + (1 - alpha) * theta_ref: the paper's soft update for alpha below 1, its hard
    update for alpha 1. The reference needs weights of its own. They are state then, and so they are part of
    the checkpoints, which a reference otherwise is not.
    """

    def __init__(self, *, every: int, alpha: float = 1.0) -> None:
        """Say how the reference follows.

        Args:
            every: Optimizer steps from one update to the next.
            alpha: Share of the policy in the new reference, above 0 and up to 1.

        Raises:
            ValueError: If a setting is out of range.
        """
        check_bounds(least=1, unit=" optimizer step", every=every)
        check_bounds(above=0, most=1, alpha=alpha)
        self.every = every
        self.alpha = alpha
        self.updates = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what would not be saved whole.

        Raises:
            ValueError: Under FSDP1.
        """
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                "`ReferenceSync` needs the reference in checkpoints, which FSDP1 does not write here; use "
                "lightning_dpo.parallel.FSDP2Strategy"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a reference that cannot follow.

        Raises:
            ValueError: If it has no weights of its own, or not the policy's architecture.
        """
        module: ReferencedPolicy = pl_module  # type: ignore[assignment]
        reference = module.reference.model
        if not module.reference.can_update or reference is None:
            raise ValueError(
                "`ReferenceSync` needs a reference with weights of its own, got "
                f"{type(module.reference).__name__}: log-probabilities that are kept would be stale, and an "
                "adapter's base weights are the policy's too. Use reference=\"frozen\" without `lora`, or "
                "leave the callback out"
            )
        ours, theirs = _shapes(module.policy), _shapes(reference)
        if ours != theirs:
            other = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
            raise ValueError(
                "`ReferenceSync` mixes weights one by one, so policy and reference must be of one "
                f"architecture and without an adapter; {len(other)} weights differ in name or "
                f"shape, first {other[0]}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Keep the number of updates in a checkpoint."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the number of updates from a checkpoint."""
        self.updates = state_dict["updates"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the reference when a step that is due was taken."""
        due = trainer.global_step // self.every
        if due <= self.updates:
            return
        self.updates = due
        module: ReferencedPolicy = pl_module  # type: ignore[assignment]
        assert module.reference.model is not None
        with torch.no_grad():
            mix_weights(module.policy, into=module.reference.model, share=self.alpha)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}
