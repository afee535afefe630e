"""Copies to a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_asynchronous", "send"]

_WAITING = ("cpu", "mps")
"""Devices that a copy must have reached before the host goes on: a CPU reads at once, MPS gets it wrong."""


def is_asynchronous(device: torch.device | str) -> bool:
    """Whether the host may go on while a copy to a device is under way."""
    return torch.device(device).type not in _WAITING


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device without waiting for it; from pinned memory where the device is a GPU."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=is_asynchronous(device))
