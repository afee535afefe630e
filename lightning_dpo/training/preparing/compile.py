"""Compilation of the part that computes, and of nothing around it."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_dpo.models.build import PolicySettings
from lightning_dpo.parallel.sharding import blocks

__all__ = ["compile_blocks", "left_to_compiler"]


def compile_blocks(model: nn.Module) -> None:
    """Compile what a model repeats, for rows of any shape; names in its state stay as they are.

    Its blocks are alike, so one compilation serves all. What calls them is not compiled: an adapter's wrapper
    is gone around by scoring, and the embedding and the head stand outside of blocks.

    Args:
        model: Any module; one without blocks is compiled whole.
    """
    for part in blocks(model) or [model]:
        part.compile(dynamic=True)


def left_to_compiler(settings: PolicySettings) -> PolicySettings:
    """Leave out what torch's compiler does by itself: it chooses what a block recomputes.

    A selective checkpoint around compiled code would run all of it again.

    Args:
        settings: Of a policy whose blocks will be compiled.
    """
    if settings.gradient_checkpointing != "selective":
        return settings
    rank_zero_info('gradient_checkpointing: "selective" is left to the compiler of the blocks')
    return settings._replace(gradient_checkpointing=False)
