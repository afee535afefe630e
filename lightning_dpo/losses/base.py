"""What every preference loss has in common, and the checks of their arguments."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from numbers import Real

from torch import Tensor, nn

from lightning_dpo.types import PairLogps

__all__ = ["PreferenceLoss"]


class PreferenceLoss(nn.Module, ABC):
    """A loss of preference pairs; subclass it and override `forward` for a loss of your own.

    Attributes:
        needs_reference: Whether `forward` reads the reference's log-probs. False saves the reference model.
        needs_confidence: Whether `forward` reads the policy's confidences, which scoring then computes.
        needs_heads: Whether `forward` reads the log-probs of the completions' heads.
        mixes_pairs: Whether one pair's loss holds other pairs' completions, so that weights of single pairs
            have no meaning.
        beta: Rewards are logged as beta times the log-ratio to the reference. A loss without such a constant
            leaves it at 1, so that its rewards are the log-ratios themselves.
    """

    needs_reference: bool = True
    needs_confidence: bool = False
    needs_heads: bool = False
    mixes_pairs: bool = False
    beta: float = 1.0

    @abstractmethod
    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair.

        Args:
            policy: Log-probs under the model that trains, (batch,) each.
            reference: Log-probs under the reference, (batch,) each, without gradient.

        Returns:
            Loss of each pair, (batch,).

        Raises:
            ValueError: If the loss needs a reference and `reference` is None.
        """

    def expected_at_start(self) -> float | None:
        """The loss of every pair while the policy equals the reference; None where it depends on the data.

        The check on the first batch compares the measured loss with it.
        """
        return None

    def required(self, reference: PairLogps | None) -> PairLogps:
        """The reference's log-probs, for losses that cannot do without.

        Raises:
            ValueError: If there are none.
        """
        if reference is None:
            raise ValueError(
                f"`reference` must hold the reference's log-probs for {type(self).__name__}, got None; "
                "give the module a reference, or choose a loss that needs none, such as SimPOLoss or ORPOLoss"
            )
        return reference

    def logratios(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """Log-ratios r of chosen and rejected completions, log pi - log pi_ref, (batch,) each.

        Raises:
            ValueError: If `reference` is None.
        """
        reference = self.required(reference)
        return policy.chosen - reference.chosen, policy.rejected - reference.rejected

    def extra_repr(self) -> str:
        """The constructor's plain arguments, for printing a module."""
        names = inspect.signature(type(self)).parameters
        values = {name: getattr(self, name, None) for name in names}
        plain = {name: value for name, value in values.items() if isinstance(value, str | float | int | list)}
        return ", ".join(f"{name}={value!r}" for name, value in plain.items())


def check_positive(name: str, value: float, *, hint: str) -> float:
    """The value, if it is a finite number above 0; else a ValueError that names the argument."""
    if not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(f"`{name}` must be a finite number greater than 0, got {name}={value!r}; {hint}")
    return value


def check_range(name: str, value: float, *, low: float, high: float, hint: str, ends: str = "both") -> float:
    """The value, if it is a number in the range; else a ValueError that names the argument.

    Args:
        name: The argument's name.
        value: What came.
        low: Lower end.
        high: Upper end.
        hint: What to do instead.
        ends: The ends that belong to the range: "both", "low", "high" or "none".
    """
    above = _is_number(value) and (value >= low if ends in ("both", "low") else value > low)
    below = _is_number(value) and (value <= high if ends in ("both", "high") else value < high)
    if not (above and below):
        opening = "[" if ends in ("both", "low") else "("
        closing = "]" if ends in ("both", "high") else ")"
        raise ValueError(f"`{name}` must be in {opening}{low}, {high}{closing}, got {name}={value!r}; {hint}")
    return value


def check_non_negative(name: str, value: float, *, hint: str) -> float:
    """The value, if it is a finite number of at least 0; else a ValueError that names the argument."""
    if not (_is_number(value) and 0 <= value < math.inf):
        raise ValueError(f"`{name}` must be a finite number of at least 0, got {name}={value!r}; {hint}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
