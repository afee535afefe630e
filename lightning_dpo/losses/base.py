"""What every preference loss has in common."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, Self

from torch import Tensor, nn

from lightning_dpo.types import PairLogps

__all__ = ["PreferenceLoss", "losses_with", "per_token", "unknown_argument"]


class PreferenceLoss(nn.Module, ABC):
    """A loss of preference pairs; subclass it and override `forward` for a loss of your own.

    Attributes:
        needs_reference: Whether `forward` reads the reference's log-probs. False saves the reference model.
        needs_confidence: Whether `forward` reads the policy's confidences, which scoring then computes.
        needs_margins: Whether `forward` reads the pairs' margins, which the data must then say.
        mixes_pairs: Whether one pair's loss holds other pairs' completions, so that weights of single pairs
            have no meaning.
        beta: Scale of the rewards. A loss without such a constant leaves it at 1.
        loss_at_start: What `expected_at_start` gives, of a loss whose arguments do not change it.
    """

    needs_reference: bool = True
    needs_confidence: bool = False
    needs_margins: bool = False
    mixes_pairs: bool = False
    beta: float = 1.0
    loss_at_start: float | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse arguments that the loss does not have before Python does, to name the losses that have them.

        Raises:
            ValueError: For the first such argument.
        """
        parameters = inspect.signature(cls.__init__).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for name in () if takes_any else kwargs:
            if name not in parameters:
                raise ValueError(unknown_argument(name, loss=cls))
        return super().__new__(cls)

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

    def rewards(self, policy: PairLogps, reference: PairLogps | None = None) -> tuple[Tensor, Tensor]:
        """Rewards of the chosen and the rejected completions: what the loss compares, in its own units.

        Logged rewards and accuracy come from them. Here they are beta times the log-ratios to the reference,
        or beta times the log-probs where there is no reference or the loss needs none; a loss that compares
        something else overrides this.

        Args:
            policy: Log-probs under the model that trains, (batch,) each.
            reference: Log-probs under the reference, (batch,) each.

        Returns:
            Rewards of the chosen and of the rejected completions, (batch,) each.
        """
        if reference is None or not self.needs_reference:
            return self.beta * policy.chosen, self.beta * policy.rejected
        chosen, rejected = self.logratios(policy, reference)
        return self.beta * chosen, self.beta * rejected

    def expected_at_start(self) -> float | None:
        """The loss of every pair while the policy equals the reference; None where it depends on the data.

        The check on the first batch compares the measured loss with it.
        """
        return self.loss_at_start

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
        values = {name: getattr(self, name, None) for name in _arguments(type(self))}
        plain = {name: value for name, value in values.items() if isinstance(value, str | float | int | list)}
        return ", ".join(f"{name}={value!r}" for name, value in plain.items())


def per_token(sums: tuple[Tensor, Tensor], policy: PairLogps) -> tuple[Tensor, Tensor]:
    """Sums over the chosen and the rejected completions, each divided by its completion's token count.

    Args:
        sums: A number of each chosen and of each rejected completion, (batch,) each.
        policy: Holds the completions' lengths.

    Returns:
        The means over tokens of the chosen and of the rejected completions, (batch,) each.
    """
    chosen, rejected = sums
    return chosen / policy.chosen_lengths, rejected / policy.rejected_lengths


def losses_with(argument: str) -> list[str]:
    """Names of this package's losses that take an argument, in alphabetical order.

    Args:
        argument: The argument's name, such as "label_smoothing".
    """
    known = PreferenceLoss.__subclasses__()
    for loss in known:  # the list grows by each one's own subclasses
        known += loss.__subclasses__()
    shipped = [loss for loss in known if loss.__module__.startswith(f"{__package__}.")]
    concrete = [loss for loss in shipped if not inspect.isabstract(loss)]
    return sorted(loss.__name__ for loss in concrete if argument in _arguments(loss))


def unknown_argument(argument: str, *, loss: type[PreferenceLoss]) -> str:
    """What to tell the user who gave a loss an argument that it does not have.

    Args:
        argument: The argument's name.
        loss: The loss's class.
    """
    others = losses_with(argument)
    fix = f"losses that have it: {', '.join(others)}" if others else "no loss has it"
    takes = ", ".join(_arguments(loss)) or "none"
    return f"`{argument}` is not an argument of {loss.__name__}, which takes {takes}; {fix}"


def _arguments(loss: type[PreferenceLoss]) -> list[str]:
    _, *parameters = inspect.signature(loss.__init__).parameters.values()
    return [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
