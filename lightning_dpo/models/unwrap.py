"""What lies within wrappers: the model inside an adapter, and whether ranks hold parts of its weights."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

__all__ = ["causal_lm", "is_sharded"]


def causal_lm(model: nn.Module) -> nn.Module:
    """The model inside an adapter's wrapper, or the module itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold parts of a model's weights, under either version of FSDP."""
    return any(isinstance(part, FSDPModule | FullyShardedDataParallel) for part in model.modules())
