"""The command `lightning-dpo export`: from a checkpoint to a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import auto_cli

__all__ = ["export", "run"]


def export(checkpoint: Path, output: Path, *, merge: bool = True, max_shard_size: str = "5GB") -> None:
    """Write the policy of a checkpoint as a Hugging Face folder that `from_pretrained` loads.

    Args:
        checkpoint: A file or a sharded folder that `fit` saved.
        output: The folder to write; must be missing or empty.
        merge: Fold an adapter into the base weights; false writes the adapter alone.
        max_shard_size: Most bytes of one file of weights, such as 5GB or 500MB. All weights of a sharded
            folder are copied a file at a time, so that this and the largest single weight are all the memory
            it needs.
    """
    from lightning_dpo.training.saving.export import export_checkpoint  # torch, which `--help` does not need

    done = export_checkpoint(checkpoint, output, merge=merge, max_shard_size=max_shard_size)
    print(f"exported to {done}")


def run(arguments: Sequence[str]) -> None:
    """Export.

    Args:
        arguments: What follows `lightning-dpo export`.
    """
    auto_cli(export, args=list(arguments), as_positional=False, prog="lightning-dpo export")
