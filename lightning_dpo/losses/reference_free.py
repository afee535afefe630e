"""Losses on the policy's log-probs alone: no reference model is loaded for them."""

from __future__ import annotations

from torch import Tensor

from lightning_dpo import functional
from lightning_dpo.losses.base import PreferenceLoss, check_non_negative, check_positive
from lightning_dpo.types import PairLogps

__all__ = ["CPOLoss", "ORPOLoss", "SFTLoss", "SimPOLoss", "UnlikelihoodLoss"]


class ReferenceFreeLoss(PreferenceLoss):
    """What the losses of this file have in common."""

    needs_reference = False


class SimPOLoss(ReferenceFreeLoss):
    """SimPO, Eq. 6 of https://arxiv.org/abs/2405.14734.

    Args:
        beta: Scale of the rewards per token, greater than 0; the paper uses 2 to 2.5.
        gamma: Margin by which the chosen reward should exceed the rejected one, at least 0; half of beta is
            usual.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, beta: float = 2.0, *, gamma: float = 1.0) -> None:
        super().__init__()
        self.beta = check_positive("beta", beta, hint="usual values are 2 to 10")
        self.gamma = check_non_negative("gamma", gamma, hint="usual values are 0.3 to 0.8 times beta")

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,); `reference` is not read."""
        return functional.simpo_loss(
            policy.chosen / policy.chosen_lengths,
            rejected_mean_logps=policy.rejected / policy.rejected_lengths,
            beta=self.beta,
            gamma=self.gamma,
        )


class ORPOLoss(ReferenceFreeLoss):
    """Odds ratio preference optimisation, Eq. 6 and 7 of https://arxiv.org/abs/2403.07691.

    Args:
        odds_weight: The paper's lambda, the weight of the odds ratio beside the likelihood of the chosen
            completions; at least 0, usually 0.1.

    Raises:
        ValueError: If `odds_weight` is negative.
    """

    def __init__(self, odds_weight: float = 0.1) -> None:
        super().__init__()
        self.odds_weight = check_non_negative("odds_weight", odds_weight, hint="the paper uses 0.1 to 1")

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,); `reference` is not read."""
        return functional.orpo_loss(
            policy.chosen / policy.chosen_lengths,
            rejected_mean_logps=policy.rejected / policy.rejected_lengths,
            odds_weight=self.odds_weight,
        )


class CPOLoss(ReferenceFreeLoss):
    """Contrastive preference optimisation, https://arxiv.org/abs/2401.08417.

    Args:
        beta: Scale of the rewards, greater than 0, usually 0.1.
        sft_weight: Weight of the chosen completions' likelihood, summed over tokens; at least 0.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, beta: float = 0.1, *, sft_weight: float = 1.0) -> None:
        super().__init__()
        self.beta = check_positive("beta", beta, hint="usual values are 0.01 to 0.5")
        self.sft_weight = check_non_negative("sft_weight", sft_weight, hint="the paper uses 1")

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,); `reference` is not read."""
        return functional.cpo_loss(
            policy.chosen, rejected_logps=policy.rejected, beta=self.beta, sft_weight=self.sft_weight
        )


class SFTLoss(ReferenceFreeLoss):
    """Negative log-likelihood of the chosen completions: supervised fine-tuning on what was preferred.

    Args:
        token_weighted: False takes each completion's mean over tokens, so that every pair counts the same.
            True makes the mean over pairs the mean over the batch's tokens, so that every token counts the
            same; the batch is each rank's micro-batch.
    """

    def __init__(self, *, token_weighted: bool = False) -> None:
        super().__init__()
        self.token_weighted = token_weighted

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,), nats per token; `reference` is not read."""
        lengths = policy.chosen_lengths.to(policy.chosen.dtype)
        return -policy.chosen / (lengths.mean() if self.token_weighted else lengths)


class UnlikelihoodLoss(ReferenceFreeLoss):
    """Likelihood of the chosen, unlikelihood of the rejected: a baseline of https://arxiv.org/abs/2305.18290.

    It has no lower bound for `alpha` above 0, and degenerates on open-ended tasks, as the paper reports.

    Args:
        alpha: Weight of the rejected completions, at least 0.

    Raises:
        ValueError: If `alpha` is negative.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = check_non_negative("alpha", alpha, hint="usual values are 0 to 1")

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,); `reference` is not read."""
        return functional.unlikelihood_loss(policy.chosen, rejected_logps=policy.rejected, alpha=self.alpha)
