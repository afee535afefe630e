"""Losses on Delta, the margin between the scores of the chosen and the rejected completion."""

from __future__ import annotations

import math
from typing import get_args

from torch import Tensor

from lightning_dpo import functional
from lightning_dpo.functional.scores import Divergence
from lightning_dpo.losses.base import PreferenceLoss, per_token
from lightning_dpo.losses.checks import (
    check_beta,
    check_label_smoothing,
    check_non_negative,
    check_positive,
    check_range,
)
from lightning_dpo.types import PairLogps

__all__ = [
    "DPOLoss",
    "DPOPLoss",
    "DiscoPOPLoss",
    "EXOLoss",
    "HingeLoss",
    "IPOLoss",
    "LengthNormalizedDPOLoss",
    "MarginLoss",
    "RobustDPOLoss",
]


class MarginLoss(PreferenceLoss):
    """A loss on Delta = s(r_chosen) - s(r_rejected); subclass it for another one.

    Any score function of the f-DPO family goes with it, because what the score leaves undetermined is a
    constant of the prompt, which the difference cancels (https://arxiv.org/abs/2309.16240).

    Args:
        beta: Strength of the KL constraint, greater than 0.
        divergence: "reverse_kl", "forward_kl", "js_divergence", "alpha_divergence" or "chi_squared_kl", which
            makes DPO chi-PO (https://arxiv.org/abs/2407.13399).
        alpha: Parameter of the alpha-divergence, from 0 (forward KL) to 1 (reverse KL).
        max_reward: The R_max of chi-PO: beta Delta is clipped at plus and minus twice this. Rewards in
            [0, R_max] differ by no more, and a pair beyond it, on either side, teaches nothing further. None
            does not clip.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        beta: float = 0.1,
        *,
        divergence: Divergence = "reverse_kl",
        alpha: float = 0.5,
        max_reward: float | None = None,
    ) -> None:
        super().__init__()
        self.beta = check_beta(beta)
        if divergence not in get_args(Divergence):
            raise ValueError(f"`divergence` must be one of {get_args(Divergence)}, got {divergence=}")
        self.divergence: Divergence = divergence
        self.alpha = check_range(
            "alpha", alpha, low=0, high=1, hint="0 is the forward KL and 1 the reverse KL, 0.5 lies between"
        )
        self.max_reward = max_reward
        if max_reward is not None:
            check_positive("max_reward", max_reward, hint="None leaves margins as they are")

    def scores(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """Scores of the chosen and the rejected completions, which the margin compares, (batch,) each.

        Here they are s(r) under the divergence. A loss that compares them in another unit overrides this.

        Raises:
            ValueError: If `reference` is None.
        """
        chosen, rejected = self.logratios(policy, reference)
        return (
            functional.divergence_score(chosen, divergence=self.divergence, alpha=self.alpha),
            functional.divergence_score(rejected, divergence=self.divergence, alpha=self.alpha),
        )

    def margin(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Delta of each pair, the difference of its scores, clipped where `max_reward` says so, (batch,).

        Raises:
            ValueError: If `reference` is None.
        """
        chosen, rejected = self.scores(policy, reference)
        delta = chosen - rejected
        if self.max_reward is None:
            return delta
        limit = 2 * self.max_reward / self.beta
        return delta.clamp(-limit, limit)

    def margin_per_token(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Delta with each score divided by its completion's token count, (batch,); for losses to build on."""
        chosen, rejected = per_token(self.scores(policy, reference), policy)
        return chosen - rejected

    def rewards(self, policy: PairLogps, reference: PairLogps | None = None) -> tuple[Tensor, Tensor]:
        """Rewards of the chosen and the rejected completions: beta times their scores, (batch,) each."""
        chosen, rejected = self.scores(policy, reference)
        return self.beta * chosen, self.beta * rejected


class DPOLoss(MarginLoss):
    """Direct preference optimisation, Eq. 7 of https://arxiv.org/abs/2305.18290.

    Args:
        beta: Strength of the KL constraint, greater than 0, usually 0.01 to 0.5.
        label_smoothing: Assumed probability that a label is flipped, from 0 to below 0.5. Above 0 it is
            conservative DPO (https://ericmitchell.ai/cdpo.pdf), which is smallest at
            Delta = log((1 - label_smoothing) / label_smoothing) / beta and not at infinity.
        divergence: Constraint in place of the reverse KL, see `MarginLoss`.
        alpha: Parameter of "alpha_divergence".
        max_reward: Bound of chi-PO, see `MarginLoss`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    loss_at_start = math.log(2)  # whatever the label smoothing and the divergence

    def __init__(
        self,
        beta: float = 0.1,
        *,
        label_smoothing: float = 0.0,
        divergence: Divergence = "reverse_kl",
        alpha: float = 0.5,
        max_reward: float | None = None,
    ) -> None:
        super().__init__(beta, divergence=divergence, alpha=alpha, max_reward=max_reward)
        self.label_smoothing = check_label_smoothing(label_smoothing)

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,)."""
        delta = self.margin(policy, reference)
        return functional.dpo_loss(delta, beta=self.beta, label_smoothing=self.label_smoothing)


class IPOLoss(MarginLoss):
    """Identity preference optimisation, Eq. 17 of https://arxiv.org/abs/2310.12036.

    It regresses the margin to 1 / (2 beta), so that the policy stays near the reference even where all
    labels agree. The paper's formula is on sums over tokens, and its authors confirmed that the published
    results used means. Both are in use, and one beta means different things in them: a margin of 1 / (2 beta)
    per token, or per completion. The default is the mean, as in the published results, because its target
    does not depend on how long the completions are. It asks for about |y| times the margin that the sum asks
    for. `length_normalized` chooses between the two.

    Args:
        beta: The paper's tau, greater than 0.
        length_normalized: Divide each score by its completion's token count.
        divergence: Constraint in place of the reverse KL, see `MarginLoss`.
        alpha: Parameter of "alpha_divergence".
        max_reward: Bound of chi-PO, see `MarginLoss`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        beta: float = 0.1,
        *,
        length_normalized: bool = True,
        divergence: Divergence = "reverse_kl",
        alpha: float = 0.5,
        max_reward: float | None = None,
    ) -> None:
        super().__init__(beta, divergence=divergence, alpha=alpha, max_reward=max_reward)
        self.length_normalized = length_normalized

    def scores(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """Scores s(r) of the chosen and the rejected completions, per token or not, (batch,) each."""
        sums = super().scores(policy, reference)
        return per_token(sums, policy) if self.length_normalized else sums

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,)."""
        return functional.ipo_loss(self.margin(policy, reference), beta=self.beta)

    def expected_at_start(self) -> float:
        """The loss of every pair at the start: (1 / (2 beta))^2."""
        return (1 / (2 * self.beta)) ** 2


class HingeLoss(MarginLoss):
    """Hinge loss of SLiC on the log-ratio margin, https://arxiv.org/abs/2309.06657.

    Args:
        beta: The loss is zero from Delta = 1 / beta; greater than 0.
        divergence: Constraint in place of the reverse KL, see `MarginLoss`.
        alpha: Parameter of "alpha_divergence".
        max_reward: Bound of chi-PO, see `MarginLoss`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    loss_at_start = 1.0

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,)."""
        return functional.hinge_loss(self.margin(policy, reference), beta=self.beta)


class LengthNormalizedDPOLoss(MarginLoss):
    """DPO on scores per token, https://arxiv.org/abs/2405.14734: length alone earns nothing.

    Args:
        beta: Strength of the KL constraint, greater than 0. Margins per token are small, so it is large: 5 in
            Tulu 3 (https://arxiv.org/abs/2411.15124).
        divergence: Constraint in place of the reverse KL, see `MarginLoss`.
        alpha: Parameter of "alpha_divergence".
        max_reward: Bound of chi-PO, see `MarginLoss`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    loss_at_start = math.log(2)

    def __init__(
        self,
        beta: float = 5.0,
        *,
        divergence: Divergence = "reverse_kl",
        alpha: float = 0.5,
        max_reward: float | None = None,
    ) -> None:
        super().__init__(beta, divergence=divergence, alpha=alpha, max_reward=max_reward)

    def scores(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """Scores s(r) per token of the chosen and the rejected completions, (batch,) each."""
        return per_token(super().scores(policy, reference), policy)

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,)."""
        return functional.dpo_loss(self.margin(policy, reference), beta=self.beta)


class RobustDPOLoss(MarginLoss):
    """Robust DPO, https://arxiv.org/abs/2403.00409: unbiased where labels are flipped at a known rate.

    Args:
        beta: Strength of the KL constraint, greater than 0.
        label_smoothing: Probability that a label is flipped, from 0 (plain DPO) to below 0.5.
        divergence: Constraint in place of the reverse KL, see `MarginLoss`.
        alpha: Parameter of "alpha_divergence".
        max_reward: Bound of chi-PO, see `MarginLoss`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    loss_at_start = math.log(2)  # whatever the label smoothing

    def __init__(
        self,
        beta: float = 0.1,
        *,
        label_smoothing: float = 0.1,
        divergence: Divergence = "reverse_kl",
        alpha: float = 0.5,
        max_reward: float | None = None,
    ) -> None:
        super().__init__(beta, divergence=divergence, alpha=alpha, max_reward=max_reward)
        self.label_smoothing = check_label_smoothing(label_smoothing)

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,); negative where the margin is large."""
        delta = self.margin(policy, reference)
        return functional.robust_dpo_loss(delta, beta=self.beta, label_smoothing=self.label_smoothing)


class EXOLoss(MarginLoss):
    """Efficient exact optimisation for pairs, Eq. 16 of https://arxiv.org/abs/2402.00856.

    Args:
        beta: Strength of the KL constraint, greater than 0.
        label_smoothing: Probability of the other label, above 0 and below 0.5; the loss is infinite at 0. The
            paper recommends 1e-3.
        divergence: Constraint in place of the reverse KL, see `MarginLoss`.
        alpha: Parameter of "alpha_divergence".
        max_reward: Bound of chi-PO, see `MarginLoss`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        beta: float = 0.1,
        *,
        label_smoothing: float = 1e-3,
        divergence: Divergence = "reverse_kl",
        alpha: float = 0.5,
        max_reward: float | None = None,
    ) -> None:
        super().__init__(beta, divergence=divergence, alpha=alpha, max_reward=max_reward)
        self.label_smoothing = check_range(
            "label_smoothing",
            label_smoothing,
            low=0,
            high=0.5,
            ends="none",
            hint="EXO takes its logarithm; the paper recommends 1e-3",
        )

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,)."""
        delta = self.margin(policy, reference)
        return functional.exo_loss(delta, beta=self.beta, label_smoothing=self.label_smoothing)

    def expected_at_start(self) -> float:
        """The loss of every pair at the start: KL(fair coin || smoothed label)."""
        return -math.log(2) - math.log(self.label_smoothing * (1 - self.label_smoothing)) / 2


class DiscoPOPLoss(MarginLoss):
    """DiscoPOP, the loss found by a language model, Eq. 5 of https://arxiv.org/abs/2406.08414.

    Args:
        beta: Strength of the KL constraint, greater than 0.
        tau: Width of the change from logistic to exponential, above 0 and at most 1. Above 1 the exponential
            would outgrow its weight, so that falling margins blow up.
        divergence: Constraint in place of the reverse KL, see `MarginLoss`.
        alpha: Parameter of "alpha_divergence".
        max_reward: Bound of chi-PO, see `MarginLoss`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    loss_at_start = (math.log(2) + 1) / 2

    def __init__(
        self,
        beta: float = 0.1,
        *,
        tau: float = 0.05,
        divergence: Divergence = "reverse_kl",
        alpha: float = 0.5,
        max_reward: float | None = None,
    ) -> None:
        super().__init__(beta, divergence=divergence, alpha=alpha, max_reward=max_reward)
        self.tau = check_range("tau", tau, low=0, high=1, ends="high", hint="the paper uses 0.05")

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,)."""
        return functional.discopop_loss(self.margin(policy, reference), beta=self.beta, tau=self.tau)


class DPOPLoss(PreferenceLoss):
    """DPO-Positive, https://arxiv.org/abs/2402.13228: keeps the chosen completion's probability from falling.

    Args:
        beta: Strength of the KL constraint, greater than 0.
        anchor: The paper's lambda, at least 0 (plain DPO): nats taken off the margin for each nat that the
            chosen completion has lost against the reference.

    Raises:
        ValueError: If an argument is out of its range.
    """

    loss_at_start = math.log(2)

    def __init__(self, beta: float = 0.1, *, anchor: float = 50.0) -> None:
        super().__init__()
        self.beta = check_beta(beta)
        self.anchor = check_non_negative("anchor", anchor, hint="0 is plain DPO, usual values are 5 to 500")

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (batch,)."""
        chosen, rejected = self.logratios(policy, reference)
        return functional.dpop_loss(
            chosen - rejected, chosen_logratio=chosen, beta=self.beta, anchor=self.anchor
        )
