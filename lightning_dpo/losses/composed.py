"""Losses made of other losses: modifiers, which wrap one, and weighted sums of several."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_dpo.losses.base import PreferenceLoss
from lightning_dpo.losses.checks import check_non_negative, check_range
from lightning_dpo.types import PairLogps

__all__ = ["LDDPO", "WPO", "CombinedLoss"]


class ComposedLoss(PreferenceLoss):
    """A loss that takes over what its parts need, and beta from the first part that has one of its own."""

    def _take_over(self, parts: list[PreferenceLoss]) -> None:
        self.needs_reference = any(part.needs_reference for part in parts)
        self.needs_confidence = any(part.needs_confidence for part in parts)
        self.needs_margins = any(part.needs_margins for part in parts)
        self.mixes_pairs = any(part.mixes_pairs for part in parts)
        leading = _leading(parts)
        if _has_beta(leading):
            self.beta = leading.beta


class WPO(ComposedLoss):
    """Weighted preference optimisation, Eq. 2 of https://arxiv.org/abs/2406.11827.

    Weights each pair by how likely the policy is to write its completions itself, which brings training on
    stored pairs nearer to training on the policy's own. The weights take no gradient.

    Args:
        loss: The loss to weight.

    Raises:
        ValueError: If `loss` sorts the batch, as AOTLoss does: its elements belong to no single pair.
    """

    def __init__(self, loss: PreferenceLoss) -> None:
        super().__init__()
        if loss.mixes_pairs:
            raise ValueError(
                f"`loss` must give each pair a loss of its own to be weighted, got {type(loss).__name__}, "
                "which compares pairs across the batch; use it without WPO"
            )
        self.loss = loss
        self._take_over([loss])
        self.needs_confidence = True

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Weighted loss of each pair, (batch,).

        Raises:
            ValueError: If the policy's confidences were not computed.
        """
        if policy.chosen_confidence is None or policy.rejected_confidence is None:
            raise ValueError(
                "`policy` must hold `chosen_confidence` and `rejected_confidence` for WPO, got None; "
                "score it with `confidence=True`"
            )
        confidence = policy.chosen_confidence + policy.rejected_confidence
        losses: Tensor = self.loss(policy, reference)
        return losses * torch.exp(confidence.detach())

    def rewards(self, policy: PairLogps, reference: PairLogps | None = None) -> tuple[Tensor, Tensor]:
        """The wrapped loss's rewards: the weights are the pairs', not the completions'."""
        return self.loss.rewards(policy, reference)


class LDDPO(ComposedLoss):
    """Length desensitisation, LD-DPO, https://arxiv.org/abs/2409.06411.

    Both completions count in full up to the shorter one's length m, and what the longer one has beyond it
    counts `alpha` times, under policy and reference alike. A loss per token divides by the tokens as they
    count, m + alpha (|y| - m), so that its means stay weighted means; divided by |y|, a score would shrink
    for the length that is meant not to matter.

    Args:
        loss: The loss that sees the reweighted log-probs.
        alpha: Weight of the tokens beyond the shorter completion's length, from 0 (cut off) to 1 (no change).

    Raises:
        ValueError: If `alpha` is out of its range.
    """

    def __init__(self, loss: PreferenceLoss, *, alpha: float = 0.5) -> None:
        super().__init__()
        self.loss = loss
        self.alpha = check_range(
            "alpha", alpha, low=0, high=1, hint="it weights the tokens beyond the shorter completion"
        )
        self._take_over([loss])

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,).

        Raises:
            ValueError: If the log-probs up to the shorter completion's length were not computed.
        """
        losses: Tensor = self.loss(*self._reweighted_pair(policy, reference))
        return losses

    def rewards(self, policy: PairLogps, reference: PairLogps | None = None) -> tuple[Tensor, Tensor]:
        """The wrapped loss's rewards on the reweighted log-probs, (batch,) each.

        Raises:
            ValueError: If the log-probs up to the shorter completion's length were not computed.
        """
        return self.loss.rewards(*self._reweighted_pair(policy, reference))

    def expected_at_start(self) -> float | None:
        """The wrapped loss's value at the start: policy and reference are reweighted alike."""
        return self.loss.expected_at_start()

    def _reweighted_pair(
        self, policy: PairLogps, reference: PairLogps | None
    ) -> tuple[PairLogps, PairLogps | None]:
        policy = self._reweighted(policy, name="policy")
        if reference is not None and self.loss.needs_reference:
            reference = self._reweighted(reference, name="reference")
        return policy, reference

    def _reweighted(self, logps: PairLogps, *, name: str) -> PairLogps:
        if logps.chosen_common is None or logps.rejected_common is None:
            raise ValueError(
                f"`{name}` must hold `chosen_common` and `rejected_common` for LDDPO, got None; "
                "`lightning_dpo.scoring.forward` computes them"
            )
        dtype = logps.chosen.dtype
        chosen_lengths, rejected_lengths = logps.chosen_lengths.to(dtype), logps.rejected_lengths.to(dtype)
        shorter = torch.minimum(chosen_lengths, rejected_lengths)
        return logps._replace(
            chosen=torch.lerp(logps.chosen_common, logps.chosen, self.alpha),
            rejected=torch.lerp(logps.rejected_common, logps.rejected, self.alpha),
            chosen_lengths=torch.lerp(shorter, chosen_lengths, self.alpha),
            rejected_lengths=torch.lerp(shorter, rejected_lengths, self.alpha),
        )


class CombinedLoss(ComposedLoss):
    """Weighted sum of losses, such as DPO + SFT, or MPO (https://arxiv.org/abs/2411.10442).

    Its rewards, and its beta, are those of the first loss that has a beta: a sum of losses compares nothing
    of its own. Where none has a beta they are the first loss's.

    Args:
        losses: The losses to add, at least one.
        weights: Weight of each, at least 0; 1 each where not given.

    Raises:
        ValueError: If there are no losses, or not as many weights as losses, or a weight is negative.
    """

    def __init__(self, losses: list[PreferenceLoss], *, weights: list[float] | None = None) -> None:
        super().__init__()
        if not losses:
            raise ValueError("`losses` must hold at least one loss, got none")
        weights = [1.0] * len(losses) if weights is None else list(weights)
        if len(weights) != len(losses):
            raise ValueError(
                f"`weights` must have one number for each of the {len(losses)} losses, got {weights=}"
            )
        self.losses = nn.ModuleList(losses)
        self.weights = [
            check_non_negative(f"weights[{index}]", weight, hint="leave the loss out to switch it off")
            for index, weight in enumerate(weights)
        ]
        self._take_over(losses)

    def rewards(self, policy: PairLogps, reference: PairLogps | None = None) -> tuple[Tensor, Tensor]:
        """The rewards of the first loss that has a beta, or of the first one where none has."""
        return _leading(self._parts()).rewards(policy, reference)

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Weighted sum of the losses of each pair, (batch,)."""
        terms = [
            weight * loss(policy, reference) for weight, loss in zip(self.weights, self.losses, strict=True)
        ]
        return torch.stack(terms).sum(0)

    def expected_at_start(self) -> float | None:
        """The weighted sum of the parts' values at the start; None if one of them depends on the data."""
        total = 0.0
        for weight, loss in zip(self.weights, self._parts(), strict=True):
            value = loss.expected_at_start()
            if value is None:
                return None
            total += weight * value
        return total

    def _parts(self) -> list[PreferenceLoss]:
        return [part for part in self.losses if isinstance(part, PreferenceLoss)]


def _leading(parts: list[PreferenceLoss]) -> PreferenceLoss:
    """The first loss with a beta of its own, or the first one where none has."""
    return next((part for part in parts if _has_beta(part)), parts[0])


def _has_beta(loss: PreferenceLoss) -> bool:
    return "beta" in vars(loss)
