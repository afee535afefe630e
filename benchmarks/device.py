"""What a device is, and how fast its matrix products are at best."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

__all__ = ["Device", "measure_device"]


class Device(NamedTuple):
    """A device as it was found.

    Attributes:
        name: Its maker's name for it, or "cpu".
        capability: Compute capability, such as "9.0"; empty on the CPU.
        memory_gib: Of the GPU; 0 on the CPU.
        torch: torch's version.
        cuda: The version of CUDA that torch was built for; empty without.
        matrix_flops: Operations a second of the fastest of several runs of bfloat16 matrix products.
        matrix_size: Rows and columns of these matrices.
    """

    name: str
    capability: str
    memory_gib: float
    torch: str
    cuda: str
    matrix_flops: float
    matrix_size: int


def measure_device(name: str) -> Device:
    """Describe a device and time its products."""
    device = torch.device(name)
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 128
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return Device(
        name=properties.name if properties else device.type,
        capability=f"{properties.major}.{properties.minor}" if properties else "",
        memory_gib=properties.total_memory / 2**30 if properties else 0.0,
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        matrix_flops=_matrix_flops(device, size),
        matrix_size=size,
    )


def _matrix_flops(device: torch.device, size: int, *, runs: int = 5, products: int = 20) -> float:
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    result = left @ right
    best = float("inf")
    for _ in range(runs):
        _wait(device)
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right, out=result)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return products * 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
