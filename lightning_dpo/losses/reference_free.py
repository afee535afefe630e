"""Losses on the policy's log-probs alone: no reference model is loaded for them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dpo import functional
from lightning_dpo.losses.base import PreferenceLoss, per_token
from lightning_dpo.losses.checks import check_beta, check_non_negative, check_positive
from lightning_dpo.types import PairLogps

__all__ = ["CPOLoss", "ORPOLoss", "SFTLoss", "SimPOLoss", "UnlikelihoodLoss"]


class ReferenceFreeLoss(PreferenceLoss):
    """A loss on the policy's log-probs, which leaves a reference unread where there is one."""

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
        chosen, rejected = _mean_logps(policy)
        return functional.simpo_loss(chosen, rejected_mean_logps=rejected, beta=self.beta, gamma=self.gamma)

    def rewards(self, policy: PairLogps, reference: PairLogps | None = None) -> tuple[Tensor, Tensor]:
        """Rewards beta log pi / |y| of the chosen and the rejected completions, (batch,) each.

        `gamma` is no part of them: it is the margin between them that the loss asks for.
        """
        chosen, rejected = _mean_logps(policy)
        return self.beta * chosen, self.beta * rejected


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
        chosen, rejected = _mean_logps(policy)
        return functional.orpo_loss(chosen, rejected_mean_logps=rejected, odds_weight=self.odds_weight)

    def rewards(self, policy: PairLogps, reference: PairLogps | None = None) -> tuple[Tensor, Tensor]:
        """Log odds log(p / (1 - p)) of the chosen and the rejected completions, (batch,) each.

        p is the paper's probability of a completion, the exponential of its mean log-prob over tokens. Their
        difference is the log odds ratio inside the sigmoid of Eq. 7. `odds_weight` is no part of them: it
        stands outside the sigmoid, where it weights the term and scales no odds.
        """
        chosen, rejected = _mean_logps(policy)
        return functional.log_odds(chosen), functional.log_odds(rejected)


class CPOLoss(ReferenceFreeLoss):
    """Contrastive preference optimisation, https://arxiv.org/abs/2401.08417.

    Its rewards are beta log pi of whole completions.

    Args:
        beta: Scale of the rewards, greater than 0, usually 0.1.
        sft_weight: Weight of the chosen completions' likelihood, summed over tokens; at least 0.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, beta: float = 0.1, *, sft_weight: float = 1.0) -> None:
        super().__init__()
        self.beta = check_beta(beta)
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
            same, or as its pair does where pairs have weights; the batch is each rank's micro-batch.
    """

    def __init__(self, *, token_weighted: bool = False) -> None:
        super().__init__()
        self.token_weighted = token_weighted

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,), nats per token; `reference` is not read."""
        lengths = policy.chosen_lengths.to(policy.chosen.dtype)
        if not self.token_weighted:
            return -policy.chosen / lengths
        weights = torch.ones_like(lengths) if policy.weights is None else policy.weights.to(lengths)
        return -policy.chosen * weights.sum() / (weights * lengths).sum()

    def rewards(self, policy: PairLogps, reference: PairLogps | None = None) -> tuple[Tensor, Tensor]:
        """Log-probs per token of the chosen and the rejected completions, (batch,) each, nats.

        `token_weighted` changes how much a pair counts and leaves them as they are.
        """
        return _mean_logps(policy)


class UnlikelihoodLoss(ReferenceFreeLoss):
    """Likelihood of the chosen, unlikelihood of the rejected: a baseline of https://arxiv.org/abs/2305.18290.

    It has no lower bound for `alpha` above 0, and degenerates on open-ended tasks, as the paper reports.
    Its rewards are the log-probs of whole completions, in nats.

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


def _mean_logps(policy: PairLogps) -> tuple[Tensor, Tensor]:
    """Log-probs per token of the chosen and the rejected completions, (batch,) each."""
    return per_token((policy.chosen, policy.rejected), policy)
