"""Training over several devices; the only part that knows how weights are sharded."""

from lightning_dpo.parallel.building import build_sharded
from lightning_dpo.parallel.checkpoints import on_rank_zero
from lightning_dpo.parallel.gradients import clip_gradients, gradient_norm
from lightning_dpo.parallel.sharding import Sharding, full_state, is_sharded, shard
from lightning_dpo.parallel.strategies import FSDP1Strategy, FSDP2Strategy, check_strategy, sharding_of

__all__ = [
    "FSDP1Strategy",
    "FSDP2Strategy",
    "Sharding",
    "build_sharded",
    "check_strategy",
    "clip_gradients",
    "full_state",
    "gradient_norm",
    "is_sharded",
    "on_rank_zero",
    "shard",
    "sharding_of",
]
