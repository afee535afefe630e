"""What torch.compile is kept out of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["outside_of_graphs"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def outside_of_graphs(function: _Function) -> _Function:
    """Keep torch.compile out of a function; what is compiled within it stays compiled.

    A step lays out rows, logs and counts on the host, and attention that skips what nobody sees cuts each
    batch in a way of its own: traced, they would be compiled anew for every batch.
    """
    disabled: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled
