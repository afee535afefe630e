"""The command `lightning-dpo`, one file for each of its commands."""

from lightning_dpo.cli.main import DPOCLI, main

__all__ = ["DPOCLI", "main"]
