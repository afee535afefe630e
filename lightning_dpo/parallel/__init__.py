"""Training over several devices; the only part that knows how weights are sharded."""

from lightning_dpo.models.unwrap import is_sharded
from lightning_dpo.parallel.agreement import largest_of_ranks
from lightning_dpo.parallel.build import build_frozen, build_trained
from lightning_dpo.parallel.checkpoints import on_rank_zero
from lightning_dpo.parallel.gradients import clip_gradients, gradient_norm
from lightning_dpo.parallel.moments import sum_over_ranks, weighted_moments
from lightning_dpo.parallel.sharding import Sharding, full_state, mix_weights, shard, shard_head
from lightning_dpo.parallel.snapshot import WeightSnapshot
from lightning_dpo.parallel.strategies import FSDP1Strategy, FSDP2Strategy, sharding_for

__all__ = [
    "FSDP1Strategy",
    "FSDP2Strategy",
    "Sharding",
    "WeightSnapshot",
    "build_frozen",
    "build_trained",
    "clip_gradients",
    "full_state",
    "gradient_norm",
    "is_sharded",
    "largest_of_ranks",
    "mix_weights",
    "on_rank_zero",
    "shard",
    "shard_head",
    "sharding_for",
    "sum_over_ranks",
    "weighted_moments",
]
