"""The processes of a trial: how many, what each one holds, and how they share a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

__all__ = ["Resources"]

_DRIVER_CPUS = 0.01
"""What a trial of several workers reserves besides them; Ray refuses 0."""

_STRATEGIES = ("ddp", "fsdp1", "fsdp2")


@dataclass(frozen=True, slots=True)
class Resources:
    """What one trial takes of a cluster.

    Attributes:
        workers: Processes.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker; a fraction lets trials share one.
        strategy: How several workers share a model: "ddp", "fsdp2" or "fsdp1".
        packed: Trials that share what a worker takes, in one process.
    """

    workers: int = 1
    cpus: float = 1
    gpus: float = 0
    strategy: str = "ddp"
    packed: int = 1

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range.
        """
        if self.workers < 1:
            raise ValueError(f"`workers` must be at least 1, got {self.workers}")
        if self.cpus <= 0:
            raise ValueError(f"`cpus` must be above 0, got {self.cpus}; Ray places no process on none")
        if self.gpus < 0:
            raise ValueError(f"`gpus` must not be negative, got {self.gpus}")
        if self.workers > 1 and 0 < self.gpus < 1:
            raise ValueError(
                f"`gpus` must be 0 or at least 1 with several workers, got {self.gpus} and {self.workers} "
                "workers: NCCL refuses two ranks on one device. Set `workers: 1` to let trials share a GPU"
            )
        if self.strategy not in _STRATEGIES:
            raise ValueError(f"`strategy` must be one of {', '.join(_STRATEGIES)}, got {self.strategy!r}")

    @property
    def driver_cpus(self) -> float:
        """CPUs of the process that drives a trial's workers; a single worker drives itself."""
        return _DRIVER_CPUS if self.workers > 1 else 0.0

    @property
    def share(self) -> Resources:
        """What one trial takes where several share a process: its part of that."""
        if self.packed == 1:
            return self
        cpus, gpus = (_part(value, self.packed) for value in (self.cpus, self.gpus))
        return replace(self, cpus=cpus, gpus=gpus, packed=1)

    @property
    def per_worker(self) -> dict[str, float]:
        """What each worker takes, as Ray names it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def _part(value: float, parts: int) -> float:
    """A part in Ray's unit of a ten-thousandth, rounded down so that all parts fit."""
    return math.floor(value / parts * 10_000 + 1e-6) / 10_000
