"""The command `lightning-dpo fit`: train what a recipe describes."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dpo.training.cli import DPOCLI

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Train.

    Args:
        arguments: What follows `lightning-dpo fit`.
    """
    DPOCLI(args=["fit", *arguments])
