"""Numbers by which it shows that preference optimisation goes wrong, exact over any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_dpo.training.step_output import StepOutput
from lightning_dpo.types import PairLogps

__all__ = ["TROUBLE_SIGNS", "TroubleSigns", "logratio_signs"]

_LOGRATIOS = ("logratio/chosen", "logratio/rejected", "logratio/both_fall")
_ACCURACIES = ("rewards/accuracy_chosen_longer", "rewards/accuracy_chosen_shorter")

TROUBLE_SIGNS = (*_LOGRATIOS, *_ACCURACIES)
"""Names of what `TroubleSigns` gives, logged after "val/"."""


def logratio_signs(policy: PairLogps, reference: PairLogps) -> dict[str, Tensor]:
    """How far the completions' probabilities have moved.

    Args:
        policy: The policy's log-probabilities.
        reference: The reference's.

    Returns:
        "logratio/chosen" and "logratio/rejected", log pi - log pi_ref of the completions, nats, and
        "logratio/both_fall", 1 where both are below 0: then probability went to completions that are in no
        pair (https://arxiv.org/abs/2404.10719); (batch,) each, without gradient.
    """
    chosen = (policy.chosen - reference.chosen).detach()
    rejected = (policy.rejected - reference.rejected).detach()
    both_fall = ((chosen < 0) & (rejected < 0)).to(chosen.dtype)
    return dict(zip(_LOGRATIOS, (chosen, rejected, both_fall), strict=True))


class TroubleSigns(Metric):
    """Means over the pairs that a sign is about: all of them, or those whose chosen completion is longer."""

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    totals: Tensor
    weights: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Prepare empty sums.

        Args:
            kwargs: For torchmetrics.
        """
        super().__init__(**kwargs)
        # Apple's GPUs have no float64; elsewhere a million pairs add up without losing a digit.
        self._dtype_of_sums = torch.float32 if torch.backends.mps.is_available() else torch.float64
        for name in ("totals", "weights"):
            zeros = torch.zeros(len(TROUBLE_SIGNS), dtype=self._dtype_of_sums)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, output: StepOutput) -> None:
        """Add a batch; without a reference nothing is known of how far its pairs have moved.

        Args:
            output: What a step on pairs gave; one of another kind is passed over.
        """
        policy, reference = output.policy, output.reference
        accuracy = output.statistics.get("rewards/accuracy")
        if not isinstance(policy, PairLogps) or accuracy is None:
            return
        weights = self._sums_of(output.weights)
        nothing = torch.zeros_like(weights)
        longer = policy.chosen_lengths.to(weights) - policy.rejected_lengths.to(weights)
        values: list[Tensor] = [accuracy, accuracy]
        about = [weights * (longer > 0), weights * (longer < 0)]
        if not isinstance(reference, PairLogps):
            values, about = [nothing] * 3 + values, [nothing] * 3 + about
        else:
            values = [*logratio_signs(policy, reference).values(), *values]
            about = [weights] * 3 + about
        shares = torch.stack(about)
        numbers = torch.stack([self._sums_of(value) for value in values])
        # Not in place: after `validate` the sums are inference tensors, which `fit` may not change.
        # Converted: under bf16-true Lightning gives them the model's type, in which 2048 + 8 is 2048.
        self.totals = self._sums_of(self.totals) + (numbers * shares).sum(1)
        self.weights = self._sums_of(self.weights) + shares.sum(1)

    def compute(self) -> dict[str, Tensor]:
        """Each sign by its name, float32; without those about no pair."""
        weights = self._sums_of(self.weights)
        means = (self._sums_of(self.totals) / weights).float()
        return {
            name: mean for name, mean, weight in zip(TROUBLE_SIGNS, means, weights, strict=True) if weight > 0
        }

    def _sums_of(self, values: Tensor) -> Tensor:
        return values.to(device=self.totals.device, dtype=self._dtype_of_sums)
