"""Gradient norms where each rank holds a part of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["clip_gradients", "gradient_norm"]


def gradient_norm(gradients: Sequence[Tensor], *, strategy: Any = None) -> Tensor:
    """The norm of all gradients over all ranks, ().

    Args:
        gradients: What this rank holds.
        strategy: The trainer's; under FSDP1 gradients look like plain tensors and are parts all the same.
    """
    if not gradients:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        return norm.full_tensor()
    if _is_fsdp1(strategy):
        squares = norm.float() ** 2
        torch.distributed.all_reduce(squares)
        return squares.sqrt()
    return norm


def clip_gradients(model: nn.Module | None, *, limit: float) -> bool:
    """Clip by norm under FSDP1, where only the wrapped model can; returns whether that was done."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not isinstance(model, FullyShardedDataParallel):
        return False
    model.clip_grad_norm_(limit)
    return True


def _is_fsdp1(strategy: Any) -> bool:
    from lightning.pytorch.strategies import FSDPStrategy

    return isinstance(strategy, FSDPStrategy)
