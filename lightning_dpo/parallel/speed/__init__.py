"""How long a step will take, by arithmetic on public figures: nothing is run."""

from lightning_dpo.parallel.speed.cluster import GPUS, Cluster, Gpu
from lightning_dpo.parallel.speed.step import StepTime, plan_step

__all__ = ["GPUS", "Cluster", "Gpu", "StepTime", "plan_step"]
