"""Compilation of the part that computes, and of nothing around it."""

from __future__ import annotations

from torch import nn

from lightning_dpo.parallel.sharding import blocks

__all__ = ["compile_blocks"]


def compile_blocks(model: nn.Module) -> None:
    """Compile what a model repeats, for rows of any shape; names in its state stay as they are.

    Its blocks are alike, so one compilation serves all. What calls them is not compiled: an adapter's wrapper
    is gone around by scoring, and the embedding and the head stand outside of blocks.

    Args:
        model: Any module; one without blocks is compiled whole.
    """
    for part in blocks(model) or [model]:
        part.compile(dynamic=True)
