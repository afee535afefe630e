"""Lightning strategies whose processes Ray has started."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from ray import train
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment
from ray.train.torch import get_device

from lightning_dpo.parallel import FSDP1Strategy, FSDP2Strategy
from lightning_dpo.tuning.cluster.resources import Resources

__all__ = ["RayFSDP1Strategy", "RayFSDP2Strategy", "make_strategy", "worker_trainer_options"]


class RayFSDP2Strategy(FSDP2Strategy):
    """FSDP2 over the workers of a Ray Train group; Ray has no strategy of its own for it."""

    @property
    def root_device(self) -> torch.device:
        """The device that Ray gave this worker."""
        device: torch.device = get_device()
        return device

    @property
    def num_processes(self) -> int:
        """Workers of the group, wherever they run: to Lightning they look like one machine."""
        workers: int = train.get_context().get_world_size()
        return workers


class RayFSDP1Strategy(FSDP1Strategy):
    """FSDP1 over the workers of a Ray Train group; needs GPUs."""

    @property
    def root_device(self) -> torch.device:
        """The device that Ray gave this worker."""
        device: torch.device = get_device()
        return device

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Each worker has its own share of the data."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}


def make_strategy(name: str) -> Strategy:
    """The strategy of a short name: "ddp", "fsdp1" or "fsdp2"."""
    strategies: dict[str, type[Any]] = {
        "ddp": RayDDPStrategy,
        "fsdp1": RayFSDP1Strategy,
        "fsdp2": RayFSDP2Strategy,
    }
    strategy: Strategy = strategies[name]()
    return strategy


def worker_trainer_options(resources: Resources) -> dict[str, Any]:
    """Trainer arguments of each worker of a group.

    Args:
        resources: What the group takes of the cluster.
    """
    return {
        "devices": "auto" if resources.gpus else 1,
        "num_nodes": 1,
        "accelerator": "gpu" if resources.gpus else "cpu",
        "strategy": make_strategy(resources.strategy),
        "plugins": [RayLightningEnvironment()],  # type: ignore[no-untyped-call]
    }
