"""The command `lightning-dpo validate`: measure a checkpoint on the recipe's held-out data."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dpo.training.cli import DPOCLI

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Validate.

    Args:
        arguments: What follows `lightning-dpo validate`.
    """
    DPOCLI(args=["validate", *arguments])
