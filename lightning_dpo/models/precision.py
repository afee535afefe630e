"""Which type a model's matrix products run in, whatever type its weights are kept in."""

from __future__ import annotations

import platform
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

__all__ = ["ComputeType", "autocast_dtype", "compute_type", "has_slow_bfloat16", "weights_dtype"]

ComputeType: TypeAlias = Literal["float64", "float32", "tf32", "bfloat16", "float16"]

_NAMES: dict[torch.dtype, ComputeType] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def compute_type(model: nn.Module, *, device: torch.device) -> ComputeType:
    """The type that a model's matrix products run in here and now.

    That is autocast's where it is on, what FSDP gathers weights in where the model is sharded, else the type
    of the weights themselves; and for float32 products what `torch.set_float32_matmul_precision` allows in
    their place.

    Args:
        model: The model.
        device: Where it runs.
    """
    dtype = weights_dtype(model)
    if dtype != torch.float64:
        dtype = autocast_dtype(device) or dtype
    if dtype == torch.float32:
        return _float32_products(device)
    return _NAMES.get(dtype, "float16")


def has_slow_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are slower there than in float32: on an x86 processor without AVX-512.

    Args:
        device: Where a model runs.
    """
    is_x86 = device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    return is_x86 and "AVX512" not in torch.backends.cpu.get_cpu_capability()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes products in on a device; None where it is off, or does not exist."""
    kind = device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_on else None


def weights_dtype(model: nn.Module) -> torch.dtype:
    """The type in which a forward pass finds the weights: what FSDP gathers them in, else their own.

    Args:
        model: The model; sharded weights need not be gathered at the time.
    """
    for part in model.modules():
        if isinstance(part, FSDPModule):
            gathered = part._get_fsdp_state()._mp_policy.param_dtype
        elif isinstance(part, FullyShardedDataParallel):
            gathered = part.mixed_precision.param_dtype
        else:
            continue
        if gathered is not None:
            return gathered
    # Not the first weight: a quantised one is of integers.
    kinds = (p.dtype for p in model.parameters() if p.dtype in _NAMES)
    return next(kinds, torch.float32)


def _float32_products(device: torch.device) -> ComputeType:
    """What float32 products run in: TF32 has the 10 bits of float16, and "medium" may take bfloat16."""
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    allowed: dict[str, ComputeType] = {"tf32": "tf32", "bf16": "bfloat16"}
    return allowed.get(getattr(backend, "fp32_precision", "ieee"), "float32")
