"""Losses on the completions' log-ratios themselves, each for itself or across the batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, distributed

from lightning_dpo import functional
from lightning_dpo.losses.base import PreferenceLoss
from lightning_dpo.losses.checks import check_beta, check_label_smoothing
from lightning_dpo.types import PairLogps

__all__ = ["AOTLoss", "APODownLoss", "APOZeroLoss", "BCOLoss", "NCALoss", "SPPOLoss"]


class LogRatioLoss(PreferenceLoss):
    """A loss on the completions' log-ratios, with a beta and without a choice of the divergence.

    Most compare no two completions of one prompt, so that the constant of the prompt that other score
    functions leave undetermined would not cancel.

    Args:
        beta: Strength of the KL constraint, greater than 0.

    Raises:
        ValueError: If `beta` is not greater than 0.
    """

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = check_beta(beta)


class NCALoss(LogRatioLoss):
    """Noise contrastive alignment for pairs, https://arxiv.org/abs/2402.05369.

    Args:
        beta: Strength of the KL constraint, greater than 0.

    Raises:
        ValueError: If `beta` is not greater than 0.
    """

    loss_at_start = 2 * math.log(2)

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,)."""
        chosen, rejected = self.logratios(policy, reference)
        return functional.nca_loss(chosen, rejected_logratio=rejected, beta=self.beta)


class BCOLoss(LogRatioLoss):
    """Binary classifier optimisation, https://arxiv.org/abs/2404.04656.

    The reward that divides chosen from rejected is the mean of all rewards seen in training so far, over all
    ranks; every pair counts what its weight says and none is forgotten. A batch enters the mean before its
    loss is taken. Validation reads the mean and leaves it as it is. Checkpoints keep it.

    Args:
        beta: Strength of the KL constraint, greater than 0.
        track_delta: Whether to shift rewards by their running mean; False fixes the shift at 0.

    Raises:
        ValueError: If `beta` is not greater than 0.
    """

    loss_at_start = 2 * math.log(2)

    delta: Tensor
    pairs_seen: Tensor

    def __init__(self, beta: float = 0.1, *, track_delta: bool = True) -> None:
        super().__init__(beta)
        self.track_delta = track_delta
        self.register_buffer("delta", torch.zeros(()))
        self.register_buffer("pairs_seen", torch.zeros(()))

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,); in training mode the running mean takes the batch in first."""
        chosen, rejected = self.logratios(policy, reference)
        if self.track_delta and self.training:
            self._update((self.beta * (chosen + rejected) / 2).detach(), policy.weights)
        return functional.bco_loss(
            chosen, rejected_logratio=rejected, beta=self.beta, shift=self.delta.to(chosen)
        )

    @torch.no_grad()
    def _update(self, rewards: Tensor, weights: Tensor | None) -> None:
        weights = torch.ones_like(rewards) if weights is None else weights.to(rewards)
        total = torch.stack([(rewards * weights).sum(), weights.sum()]).float()
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(total)
        # In place, and where the buffers are: strategies keep hold of a module's buffers, moved or not.
        rewards_sum, pairs = total.to(self.delta.device)
        self.pairs_seen += pairs
        # Before any pair counts, as in a first batch of ties, there is nothing to divide: 0 / 0 would stay.
        seen = self.pairs_seen.clamp(min=torch.finfo(torch.float32).tiny)
        self.delta += (rewards_sum - pairs * self.delta) / seen

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BCOLoss:  # noqa: FBT001
        # A module cast to bfloat16 would round the mean to three digits and lose late updates altogether.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.delta, self.pairs_seen = self.delta.float(), self.pairs_seen.float()
        return self


class SPPOLoss(LogRatioLoss):
    """Self-play preference optimisation with hard labels, https://arxiv.org/abs/2405.00675.

    Args:
        beta: Strength of the KL constraint, greater than 0: log-ratios are regressed to plus or minus
            1 / (2 beta).

    Raises:
        ValueError: If `beta` is not greater than 0.
    """

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,)."""
        chosen, rejected = self.logratios(policy, reference)
        return functional.sppo_loss(chosen, rejected_logratio=rejected, beta=self.beta)

    def expected_at_start(self) -> float:
        """The loss of every pair at the start: 2 (1 / (2 beta))^2."""
        return 2 * (1 / (2 * self.beta)) ** 2


class APOZeroLoss(LogRatioLoss):
    """Anchored preference optimisation, zero, Eq. 7 of https://arxiv.org/abs/2408.06266.

    Raises the chosen and lowers the rejected: for chosen completions better than what the model writes.

    Args:
        beta: Strength of the KL constraint, greater than 0.

    Raises:
        ValueError: If `beta` is not greater than 0.
    """

    loss_at_start = 1.0

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,)."""
        chosen, rejected = self.logratios(policy, reference)
        return functional.apo_zero_loss(chosen, rejected_logratio=rejected, beta=self.beta)


class APODownLoss(LogRatioLoss):
    """Anchored preference optimisation, down, Eq. 8 of https://arxiv.org/abs/2408.06266.

    Lowers the rejected more than the chosen: for chosen completions worse than what the model writes.

    Args:
        beta: Strength of the KL constraint, greater than 0.

    Raises:
        ValueError: If `beta` is not greater than 0.
    """

    loss_at_start = 1.0

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,)."""
        chosen, rejected = self.logratios(policy, reference)
        return functional.apo_down_loss(chosen, rejected_logratio=rejected, beta=self.beta)


class AOTLoss(LogRatioLoss):
    """Alignment via optimal transport, https://arxiv.org/abs/2406.05882.

    Asks the distribution of the policy's margins to dominate the reference's, quantile by quantile. They are
    the quantiles of the batch at hand, each rank's micro-batch for itself: small batches do not add up to a
    large one, and a batch of one pair is plain DPO.

    Args:
        beta: Strength of the KL constraint, greater than 0.
        label_smoothing: Assumed probability that a label is flipped, from 0 to below 0.5.
        unpaired: Compare the chosen completions' log-ratios with the rejected ones', whichever pair they
            come from. A pair's loss is then that of its chosen completion.

    Raises:
        ValueError: If an argument is out of its range.
    """

    loss_at_start = math.log(2)

    mixes_pairs = True

    def __init__(self, beta: float = 0.1, *, label_smoothing: float = 0.0, unpaired: bool = False) -> None:
        super().__init__(beta)
        self.label_smoothing = check_label_smoothing(label_smoothing)
        self.unpaired = unpaired
        self._samples = _samples_of_completions if unpaired else _samples_of_pairs

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,)."""
        first, second = self._samples(policy, self.required(reference))
        delta = functional.aot_margin(first, second=second)
        return functional.dpo_loss(delta, beta=self.beta, label_smoothing=self.label_smoothing)


def _samples_of_completions(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """Log-ratios of the chosen completions, and of the rejected ones that they should dominate."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def _samples_of_pairs(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """The pairs' margins under the policy, and those under the reference that they should dominate."""
    return policy.chosen - policy.rejected, reference.chosen - reference.rejected
