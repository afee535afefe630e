"""What a step hands on: to callbacks, and from scoring to logging."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_dpo.training.metrics import PairStatistics
from lightning_dpo.types import PairLogps

__all__ = ["ScoredBatch", "StepRecord"]


class StepRecord(NamedTuple):
    """What the last training or validation step saw, without gradient, for callbacks.

    Attributes:
        policy: Log-probabilities under the policy.
        reference: Log-probabilities under the reference, or None.
        losses: Loss of each pair, (batch,).
        num_tokens: Tokens the policy computed.
    """

    policy: PairLogps
    reference: PairLogps | None
    losses: Tensor
    num_tokens: int


class ScoredBatch(NamedTuple):
    """A batch after scoring; fillers are gone.

    Attributes:
        loss: What the step returns, a scalar.
        weights: Weight of each pair, (batch,).
        statistics: Of each pair, without gradient.
    """

    loss: Tensor
    weights: Tensor
    statistics: PairStatistics
