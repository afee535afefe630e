"""The default learning-rate schedule."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["linear_warmup"]


def linear_warmup(optimizer: Optimizer, *, steps: int) -> LambdaLR:
    """Rise linearly to the full learning rate over the first steps, then stay, as in the DPO paper.

    Args:
        optimizer: Whose learning rate is scheduled.
        steps: Optimizer steps of warm-up; the first step already has 1 / (steps + 1) of the full rate.
    """
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (steps + 1)))
