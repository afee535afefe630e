"""The policy itself as the reference, as long as nothing has changed it."""

from __future__ import annotations

import torch
from torch import nn

from lightning_dpo.models.modes import evaluating
from lightning_dpo.models.unwrap import is_sharded
from lightning_dpo.reference.base import Reference
from lightning_dpo.scoring.forward import ScoringPlan, score
from lightning_dpo.types import CompletionBatch, CompletionLogps

__all__ = ["StartingPolicy"]


class StartingPolicy(Reference):
    """The policy before its first step: until then it is the reference.

    Attributes:
        is_unchanged: Whether the policy still has the weights it started with.
    """

    def __init__(self, policy: nn.Module) -> None:
        """Watch a policy from now on."""
        self._policy = policy
        self.is_unchanged = True
        self.watch()

    def leave(self) -> None:
        """The policy is about to change."""
        self.is_unchanged = False

    def watch(self) -> None:
        """Take the policy's tensors as they are for unchanged, such as after a strategy has set them up."""
        # By number, not by reference: the memory of tensors that are replaced must go.
        self._versions = self._current()

    def check(self) -> None:
        """Notice if a tensor was written to since `watch`."""
        if self._current() != self._versions and not is_sharded(self._policy):
            self.leave()

    @torch.no_grad()
    def logps(self, batch: CompletionBatch, *, plan: ScoringPlan) -> CompletionLogps:
        """One forward pass of the policy, in eval mode."""
        assert self.is_unchanged, "the policy is not what it was at the start"
        with evaluating(self._policy):
            return score(self._policy, batch, plan=plan._replace(confidences=False))

    def _current(self) -> dict[int, int]:
        return {id(p): p._version for p in self._policy.parameters() if not p.is_inference()}
