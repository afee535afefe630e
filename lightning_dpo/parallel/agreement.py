"""One decision of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["largest_of_ranks"]


def largest_of_ranks(strategy: Any, *, device: torch.device) -> Callable[[float], float]:
    """A function that gives every rank the largest of the numbers that all ranks call it with.

    Args:
        strategy: The trainer's.
        device: Where it communicates from.
    """

    def agree(number: float) -> float:
        return float(strategy.reduce(torch.tensor(number, device=device), reduce_op="max"))

    return agree
