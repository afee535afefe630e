"""The command `lightning-dpo validate`: measure a checkpoint on the recipe's held-out data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lightning_dpo.training.cli import DPOCLI

__all__ = ["run"]

_NONE_FOUND = r".*there is no last checkpoint available"
"""Lightning's warning, after which it would measure the weights that training began from."""


def run(arguments: Sequence[str]) -> None:
    """Validate.

    Args:
        arguments: What follows `lightning-dpo validate`.

    Raises:
        ValueError: If the settings cannot be used, or no last checkpoint is there.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=_NONE_FOUND)
        try:
            DPOCLI(args=["validate", *arguments])
        except UserWarning as none_found:
            raise ValueError(
                "`ckpt_path` last must find a checkpoint in the folder of this run's ModelCheckpoint, and "
                "there is none; give the file, such as lightning_logs/version_0/checkpoints/last.ckpt"
            ) from none_found
