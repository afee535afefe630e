"""Gradient norms where each rank holds a part of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = ["clip_gradients", "gradient_norm"]


def gradient_norm(gradients: Sequence[Tensor], *, strategy: Any = None) -> Tensor:
    """The norm of all gradients over all ranks, ().

    Args:
        gradients: What this rank holds.
        strategy: The trainer's; under FSDP1 gradients look like plain tensors and are parts all the same.
    """
    if not gradients and not _is_fsdp1(strategy):
        return torch.zeros(())
    # Under FSDP1 a rank may hold no part of any gradient, of an adapter's say, and joins the others' sum.
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else _zero(strategy)
    if isinstance(norm, DTensor):
        return norm.full_tensor()
    if _is_fsdp1(strategy):
        squares = norm.float() ** 2
        torch.distributed.all_reduce(squares)
        return squares.sqrt()
    return norm


def clip_gradients(trainer: Any, optimizer: Optimizer, *, limit: float | None, algorithm: str | None) -> bool:
    """Clip where Lightning's own way would not do; returns whether that was done.

    Args:
        trainer: Lightning's.
        optimizer: The optimizer whose gradients are clipped.
        limit: Norm or value that gradients are clipped to; None or 0 leaves them.
        algorithm: "norm", "value", or None for "norm".
    """
    if limit and algorithm in (None, "norm") and isinstance(trainer.model, FullyShardedDataParallel):
        trainer.model.clip_grad_norm_(float(limit))  # under FSDP1 only the wrapped model can
        return True
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.scaler is None and limit:
        # Lightning keeps fused optimizers from clipping for float16's loss scale; here is none.
        Precision.clip_gradients(plugin, optimizer, limit, GradClipAlgorithmType(algorithm or "norm"))
        return True
    return False


def _zero(strategy: Any) -> Tensor:
    return torch.zeros((), device=strategy.root_device)


def _is_fsdp1(strategy: Any) -> bool:
    from lightning.pytorch.strategies import FSDPStrategy

    return isinstance(strategy, FSDPStrategy)
