"""Compilation of the part that computes, and of nothing around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["compile_backbone", "outside_of_graphs"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def outside_of_graphs(function: _Function) -> _Function:
    """Keep torch.compile out of a function; what is compiled within it stays compiled.

    A step lays out rows, logs and counts on the host: traced, it would be compiled anew for every batch.
    """
    disabled: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def compile_backbone(policy: nn.Module) -> None:
    """Compile a policy without its head, for rows of any shape; names in its state stay as they are."""
    backbone = getattr(policy, "base_model", policy)
    backbone.compile(dynamic=True)
