"""Training and evaluation mode, and dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["disable_dropout", "evaluating"]


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode for a while; every submodule gets its own mode back."""
    training = [part for model in models for part in model.modules() if part.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, in modules and in the attributes attention code reads.

    DPO compares two log-probabilities of the same text; noise in one of them is noise in the loss.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
