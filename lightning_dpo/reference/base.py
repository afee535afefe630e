"""What a reference is: a source of log-probabilities that takes no gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lightning_dpo.scoring.forward import ScoringPlan
from lightning_dpo.types import CompletionBatch, CompletionLogps

__all__ = ["NoReference", "Reference"]


class Reference(ABC):
    """A source of reference log-probabilities. Not an nn.Module, so no trainer finds weights in it.

    Attributes:
        can_update: Whether the reference has weights of its own that may follow the policy, as TR-DPO wants
            (https://arxiv.org/abs/2404.09656). Not so where log-probabilities are kept.
        passes: Forward passes that were made for it in this run.
    """

    can_update: bool = False
    passes: int = 0

    @abstractmethod
    def logps(self, batch: CompletionBatch, *, plan: ScoringPlan) -> CompletionLogps | None:
        """Log-probabilities of the batch, without gradient; None where there is no reference.

        Args:
            batch: Prompts and completions, on the policy's device.
            plan: How the policy is scored; the reference's confidences are never computed.
        """

    def token_logps(self, batch: CompletionBatch, *, plan: ScoringPlan) -> Tensor:
        """Log-probability of each completion token, without gradient, (completion_tokens,).

        Args:
            batch: Prompts and completions, on the policy's device.
            plan: How the policy is scored.

        Raises:
            ValueError: If the reference has no weights at hand to score completions with.
        """
        raise ValueError(
            f"`reference` must score single tokens, got a {type(self).__name__}, which does not; use "
            '"frozen", "adapter" or a model'
        )

    @property
    def model(self) -> nn.Module | None:
        """The reference's own weights, where it has any."""
        return None

    @property
    def identity(self) -> str | None:
        """Which weights the reference has, where that is known without looking at them."""
        return None

    @property
    def disagreement(self) -> str:
        """What likely explains that the policy disagrees at the start, if no weights can be compared."""
        return "the adapter does not start at zero; the policy must be a fresh adapter on the base weights"

    def match(self, policy: nn.Module) -> None:  # noqa: B027 (a reference without weights has nothing to do)
        """Follow the policy to its device and type, which the trainer sets after construction."""


class NoReference(Reference):
    """The reference of losses that need none."""

    def logps(self, batch: CompletionBatch, *, plan: ScoringPlan) -> None:
        """Nothing is computed."""
