"""Compilation of the part that computes, and of nothing around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_dpo.parallel.sharding import blocks

__all__ = ["compile_blocks", "outside_of_graphs"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def outside_of_graphs(function: _Function) -> _Function:
    """Keep torch.compile out of a function; what is compiled within it stays compiled.

    A step lays out rows, logs and counts on the host: traced, it would be compiled anew for every batch.
    """
    disabled: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def compile_blocks(model: nn.Module) -> None:
    """Compile what a model repeats, for rows of any shape; names in its state stay as they are.

    Its blocks are alike, so one compilation serves all. What calls them is not compiled: an adapter's wrapper
    is gone around by scoring, and the embedding and the head stand outside of blocks.

    Args:
        model: Any module; one without blocks is compiled whole.
    """
    for part in blocks(model) or [model]:
        part.compile(dynamic=True)
