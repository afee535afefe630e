"""Checks of the losses' arguments: the value comes back, or a ValueError names the argument."""

from __future__ import annotations

import math
from numbers import Real

__all__ = ["check_beta", "check_label_smoothing", "check_non_negative", "check_positive", "check_range"]


def check_beta(beta: float) -> float:
    """The strength of a KL constraint, if it is a finite number above 0; else a ValueError."""
    return check_positive("beta", beta, hint="usual values are 0.01 to 0.5")


def check_label_smoothing(label_smoothing: float) -> float:
    """The assumed probability that a label is flipped, if it is in [0, 0.5); else a ValueError."""
    hint = "it is the assumed probability that a label is flipped, usually 0 to 0.2"
    return check_range("label_smoothing", label_smoothing, low=0, high=0.5, ends="low", hint=hint)


def check_positive(name: str, value: float, *, hint: str) -> float:
    """The value, if it is a finite number above 0; else a ValueError that names the argument."""
    if not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(f"`{name}` must be a finite number greater than 0, got {name}={value!r}; {hint}")
    return value


def check_range(name: str, value: float, *, low: float, high: float, hint: str, ends: str = "both") -> float:
    """The value, if it is a number in the range; else a ValueError that names the argument.

    Args:
        name: The argument's name.
        value: The value that came.
        low: Lower end of the range.
        high: Upper end of the range.
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
