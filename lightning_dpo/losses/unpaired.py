"""Losses of unpaired feedback: single completions, each judged desirable or not."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, distributed, nn

from lightning_dpo import functional
from lightning_dpo.losses.checks import check_beta, check_non_negative
from lightning_dpo.types import CompletionLogps

__all__ = ["KTOLoss", "UnpairedAPOZeroLoss", "UnpairedLoss"]

_WEIGHT_HINT = "it is what an example of this kind counts, usually 1 to 4/3"


class UnpairedLoss(nn.Module, ABC):
    """A loss of judged completions; subclass it and override `forward` for a loss of your own.

    Args:
        beta: Strength of the KL constraint, greater than 0.
        desirable_weight: What a desirable completion counts, at least 0.
        undesirable_weight: What an undesirable completion counts, at least 0.

    Raises:
        ValueError: If an argument is out of its range.

    Attributes:
        needs_z0: Whether `forward` reads `z0`, for which completions are scored with prompts that they do not
            answer.
    """

    needs_z0: bool = False

    def __init__(
        self, beta: float = 0.1, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.beta = check_beta(beta)
        self.desirable_weight = check_non_negative("desirable_weight", desirable_weight, hint=_WEIGHT_HINT)
        self.undesirable_weight = check_non_negative(
            "undesirable_weight", undesirable_weight, hint=_WEIGHT_HINT
        )

    @abstractmethod
    def forward(
        self,
        policy: CompletionLogps,
        reference: CompletionLogps,
        *,
        labels: Tensor,
        z0: Tensor | float = 0.0,
    ) -> Tensor:
        """Loss of each example.

        Args:
            policy: Log-probs under the model that trains, (batch,) each.
            reference: Log-probs under the reference, (batch,) each, without gradient.
            labels: Whether each completion is desirable, (batch,) of bool.
            z0: What `estimate_z0` gave, for a loss that needs it.

        Returns:
            Loss of each example, (batch,).
        """

    @staticmethod
    @torch.no_grad()
    def estimate_z0(policy: CompletionLogps, reference: CompletionLogps, *, weights: Tensor) -> Tensor:
        """Estimate z0 from mismatched completions; where processes share the batch, all must call it.

        Args:
            policy: Log-probs of prompts with completions of other prompts, (batch,) each.
            reference: The same under the reference.
            weights: Weight of each, (batch,); 0 for one that is not mismatched.

        Returns:
            A scalar without gradient.
        """
        logratio = policy.logps - reference.logps
        weights = weights.to(logratio)
        sums = torch.stack([(logratio * weights).sum(), weights.sum()])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        return functional.kto_z0(sums[0], weight_sum=sums[1])

    def rewards(self, policy: CompletionLogps, reference: CompletionLogps) -> Tensor:
        """Rewards of the completions, beta times their log-ratios, (batch,)."""
        return self.beta * (policy.logps - reference.logps)

    def expected_at_start(self) -> float | None:
        """The loss of every example while the policy equals the reference; None if it differs between them.

        Every log-ratio is 0 then, so that each is half of what its example counts.
        """
        equal = self.desirable_weight == self.undesirable_weight
        return self.desirable_weight / 2 if equal else None

    def extra_repr(self) -> str:
        """The constructor's arguments, for printing a module."""
        return (
            f"beta={self.beta}, desirable_weight={self.desirable_weight}, "
            f"undesirable_weight={self.undesirable_weight}"
        )


class KTOLoss(UnpairedLoss):
    """Kahneman-Tversky optimisation, https://arxiv.org/abs/2402.01306.

    A completion gains or loses against z0, an estimate of the policy's KL to the reference: the mean
    log-ratio of the batch's prompts with completions of other prompts, over all ranks, at least 0. Each
    micro-batch has a z0 of its own, so that small batches do not add up to a large one; 8 examples or more
    are advisable.

    Args:
        beta: Strength of the KL constraint, greater than 0.
        desirable_weight: What a desirable completion counts, the paper's lambda_D. Choose the two so that
            desirable_weight x desirable examples is 1 to 4/3 times undesirable_weight x undesirable ones.
        undesirable_weight: What an undesirable completion counts, the paper's lambda_U.

    Raises:
        ValueError: If an argument is out of its range.
    """

    needs_z0 = True

    def forward(
        self,
        policy: CompletionLogps,
        reference: CompletionLogps,
        *,
        labels: Tensor,
        z0: Tensor | float = 0.0,
    ) -> Tensor:
        """Loss of each example, (batch,)."""
        return functional.kto_loss(
            policy.logps - reference.logps,
            labels=labels,
            beta=self.beta,
            z0=z0,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )


class UnpairedAPOZeroLoss(UnpairedLoss):
    """Anchored preference optimisation, zero, Eq. 7 of https://arxiv.org/abs/2408.06266, without pairs.

    Raises the desirable and lowers the undesirable, each against 0: cheaper than KTO, since no mismatched
    completions are scored, and the same for every size of batch.

    Args:
        beta: Strength of the KL constraint, greater than 0.
        desirable_weight: What a desirable completion counts, at least 0.
        undesirable_weight: What an undesirable completion counts, at least 0.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def forward(
        self,
        policy: CompletionLogps,
        reference: CompletionLogps,
        *,
        labels: Tensor,
        z0: Tensor | float = 0.0,
    ) -> Tensor:
        """Loss of each example, (batch,); `z0` is not read."""
        return functional.unpaired_apo_zero_loss(
            policy.logps - reference.logps,
            labels=labels,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
