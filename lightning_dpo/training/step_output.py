"""What a step leaves: the loss that is minimised, numbers to log, and what callbacks look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_dpo.types import CompletionLogps, PairLogps
from lightning_dpo.types.devices import send

__all__ = ["StepOutput", "Weighted"]


class Weighted(Protocol):
    """A batch that says what its examples count.

    Attributes:
        weights: Weight of each example, (batch,), on the CPU; 0 marks one that only keeps ranks in step.
        denominator: What the weighted sum of losses is divided by; None means the sum of the weights.
    """

    weights: Tensor
    denominator: float | None


class StepOutput(NamedTuple):
    """A training or validation step.

    Attributes:
        loss: What is minimised, a scalar.
        losses: Loss of each example, (batch,).
        weights: Weight of each example, (batch,).
        statistics: Numbers of each example by the name they are logged under, (batch,) each, no gradient.
        num_tokens: Tokens that the policy computed.
        policy: Log-probabilities under the policy, where callbacks may want them.
        reference: Log-probabilities under the reference, or None.
    """

    loss: Tensor
    losses: Tensor
    weights: Tensor
    statistics: Mapping[str, Tensor]
    num_tokens: int = 0
    policy: PairLogps | CompletionLogps | None = None
    reference: PairLogps | CompletionLogps | None = None

    @classmethod
    def of(
        cls,
        losses: Tensor,
        batch: Weighted,
        *,
        statistics: Mapping[str, Tensor],
        weights: Tensor | None = None,
        num_tokens: int = 0,
        policy: PairLogps | CompletionLogps | None = None,
        reference: PairLogps | CompletionLogps | None = None,
    ) -> StepOutput:
        """The step whose loss is the mean over the batch's examples, also where batches are accumulated.

        Args:
            losses: Loss of each example, (batch,).
            batch: Says what its examples count.
            statistics: Numbers of each example by the name they are logged under, (batch,) each.
            weights: Weight of each of `losses`, where examples of the batch were left out.
            num_tokens: Tokens that the policy computed.
            policy: Log-probabilities under the policy, where callbacks may want them.
            reference: Log-probabilities under the reference, or None.
        """
        weights = send(batch.weights if weights is None else weights, losses.device)
        denominator = batch.denominator or float(batch.weights.sum()) or 1.0
        return cls(
            loss=(losses * weights).sum() / denominator,
            losses=losses,
            weights=weights,
            statistics={name: values.detach() for name, values in statistics.items()},
            num_tokens=num_tokens,
            policy=policy,
            reference=reference,
        )

    def on_host(self) -> tuple[dict[str, Tensor], Tensor]:
        """The statistics and the weights on the CPU, read back from the device in one copy."""
        columns_here = [*self.statistics.values(), self.weights]
        table = torch.stack([column.to(self.losses) for column in columns_here]).cpu()
        *columns, weights = table.unbind()
        return dict(zip(self.statistics, columns, strict=True)), weights

    def detach(self) -> StepOutput:
        """The step's numbers without gradient, which keep no activations."""
        policy = self.policy
        if policy is not None:
            policy = policy._replace(**{k: v.detach() for k, v in policy._asdict().items() if v is not None})
        return self._replace(loss=self.loss.detach(), losses=self.losses.detach(), policy=policy)
