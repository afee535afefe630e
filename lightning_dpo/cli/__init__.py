"""The command `lightning-dpo`, one file for each of its commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_dpo.cli.main import main

if TYPE_CHECKING:
    from lightning_dpo.training.cli import DPOCLI

__all__ = ["DPOCLI", "main"]


def __getattr__(name: str) -> Any:
    """Import `DPOCLI` when it is first used: it needs torch, and the list of commands does not."""
    if name != "DPOCLI":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_dpo.training.cli import DPOCLI

    return DPOCLI
