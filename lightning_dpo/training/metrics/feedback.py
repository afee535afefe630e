"""What is logged about judged completions: numbers of each class, and how well rewards tell them apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_dpo.types import CompletionLogps

__all__ = ["CLASS_METRICS", "FeedbackMeans", "FeedbackStatistics", "class_metrics", "reward_auc"]


class FeedbackStatistics(NamedTuple):
    """Numbers of each judged completion, (batch,) each, without gradient.

    Attributes:
        reward: beta times its log-ratio.
        logps: log pi of the completion, nats.
        logratio: log pi - log pi_ref, nats: comparable between runs of different beta.
        desirable: 1 for a desirable completion, 0 for another.
    """

    reward: Tensor
    logps: Tensor
    logratio: Tensor
    desirable: Tensor

    @classmethod
    def of(
        cls, policy: CompletionLogps, reference: CompletionLogps, *, reward: Tensor, labels: Tensor
    ) -> FeedbackStatistics:
        """Statistics of a scored batch.

        Args:
            policy: The policy's log-probabilities.
            reference: The reference's.
            reward: Rewards of the completions, (batch,).
            labels: Whether each is desirable, (batch,).
        """
        logps = policy.logps.detach()
        return cls(reward.detach(), logps, logps - reference.logps, labels.to(logps))


CLASS_METRICS = (
    "rewards/desirable",
    "rewards/undesirable",
    "rewards/margin",
    "rewards/auc",
    "logps/desirable",
    "logps/undesirable",
    "logratio/margin",
)
"""Names of what `class_metrics` gives, logged after "train/" or "val/"."""


def reward_auc(rewards: Tensor, *, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Share of (desirable, undesirable) couples in which the desirable completion has the larger reward.

    This is the area under the ROC curve of the rewards as a guess of the labels; ties count half. It is 1/2
    at the start, where all rewards are 0, and comparable between runs of different beta.

    Args:
        rewards: Rewards, (examples,).
        labels: Whether each is desirable, (examples,) of bool.
        weights: Weight of each, (examples,); a couple counts the product of its two.

    Returns:
        A scalar, float64 where the device has it; NaN without examples of both labels.
    """
    dtype = torch.float32 if rewards.device.type == "mps" else torch.float64
    weights = torch.ones_like(rewards, dtype=dtype) if weights is None else weights.to(rewards.device, dtype)
    up, down = weights * labels, weights * ~labels
    # Examples of one reward stand together; those below are the sum up to the place before.
    _, place = torch.unique(rewards, return_inverse=True)
    ups, downs = (up.new_zeros(len(rewards)).index_add(0, place, part) for part in (up, down))
    below = downs.cumsum(0) - downs
    return (ups * (below + downs / 2)).sum() / (up.sum() * down.sum())


def class_metrics(statistics: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Means over the desirable and over the undesirable examples, their margins, and the AUC of rewards.

    Args:
        statistics: The fields of `FeedbackStatistics`, (examples,) each.
        weights: Weight of each example, (examples,).

    Returns:
        A number for each of `CLASS_METRICS`; NaN where a class has no example.
    """
    labels = statistics["desirable"] > 0
    weights = weights.to(statistics["reward"])

    def means(name: str) -> tuple[Tensor, Tensor]:
        up, down = weights * labels, weights * ~labels
        values = statistics[name]
        return (values * up).sum() / up.sum(), (values * down).sum() / down.sum()

    rewards, logps, logratios = means("reward"), means("logps"), means("logratio")
    auc = reward_auc(statistics["reward"], labels=labels, weights=weights)
    values = (*rewards, rewards[0] - rewards[1], auc, *logps, logratios[0] - logratios[1])
    return {name: value.float() for name, value in zip(CLASS_METRICS, values, strict=True)}


class FeedbackMeans(Metric):
    """Class metrics of a whole validation set, exact over any number of ranks: every example is kept."""

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        """Begin without examples.

        Args:
            kwargs: For torchmetrics.
        """
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, statistics: Mapping[str, Tensor], weights: Tensor) -> None:
        """Add a batch.

        Args:
            statistics: The fields of `FeedbackStatistics`, (batch,) each.
            weights: Weight of each example, (batch,).
        """
        columns = [statistics[name] for name in FeedbackStatistics._fields]
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.rows.append(torch.stack([*columns, weights.to(columns[0])], dim=1).to(dtype))

    def compute(self) -> dict[str, Tensor]:
        """A number for each of `CLASS_METRICS`, float32."""
        *columns, weights = dim_zero_cat(self.rows).unbind(1)
        return class_metrics(dict(zip(FeedbackStatistics._fields, columns, strict=True)), weights)
