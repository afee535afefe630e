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
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        for name in ("totals", "weights"):
            self.add_state(name, torch.zeros(len(TROUBLE_SIGNS), dtype=dtype), dist_reduce_fx="sum")

    def update(self, output: StepOutput) -> None:
        """Add a batch; without a reference nothing is known of how far its pairs have moved.

        Args:
            output: What a step on pairs gave; one of another kind is passed over.
        """
        policy, reference = output.policy, output.reference
        accuracy = output.statistics.get("rewards/accuracy")
        if not isinstance(policy, PairLogps) or accuracy is None:
            return
        weights = output.weights
        weights = weights.to(self.totals)
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
        # Not in place: after `validate` the sums are inference tensors, which `fit` may not change.
        self.totals = self.totals + (torch.stack([value.to(self.totals) for value in values]) * shares).sum(1)
        self.weights = self.weights + shares.sum(1)

    def compute(self) -> dict[str, Tensor]:
        """Each sign by its name, float32; without those about no pair."""
        means = (self.totals / self.weights).float()
        return {
            name: mean
            for name, mean, weight in zip(TROUBLE_SIGNS, means, self.weights, strict=True)
            if weight > 0
        }
