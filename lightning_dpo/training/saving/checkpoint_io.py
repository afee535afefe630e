"""Checkpoints that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_dpo.files import PARTIAL, discard, partial_name, put_back, put_in_place
from lightning_dpo.parallel.checkpoints import unwritable

__all__ = ["AtomicCheckpointIO", "WholeCheckpoints"]

_LEFT_OVER_AFTER = 3600.0
"""Seconds without a write after which a temporary is a killed run's, and not another run's that goes on."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint in one file beside its place, flushes it to the disk, and renames it.

    Lightning writes it to the system's temporary folder and moves it: where that is another file system the
    move is a copy, and a process that dies in it leaves a torn file in the older one's place. URLs of other
    file systems are left to Lightning: object stores show an object only when it is whole.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; what had its name is there until the new one is whole.

        Args:
            checkpoint: What `torch.save` takes.
            path: Where to, or an fsspec URL.
            storage_options: Not supported, as in TorchCheckpointIO.

        Raises:
            OSError: If it cannot be written, as on a full disk; what was there still is.
        """
        system, local = url_to_fs(str(path))
        if storage_options is not None or not isinstance(system, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(local)
        scratch = partial_name(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(scratch, target)
        except (OSError, RuntimeError) as error:
            raise unwritable(target, error) from error
        finally:
            discard(scratch)


class WholeCheckpoints(pl.Callback):
    """Gives the trainer `AtomicCheckpointIO`, unless the user chose another CheckpointIO.

    What a run that was killed while it wrote has left is removed as the next one starts, from the folders of
    the checkpoint callbacks and of the checkpoint that is resumed from.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before a checkpoint is read or written."""
        strategy = trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.ckpt_path is not None:
            if trainer.is_global_zero and _is_local(trainer.ckpt_path):
                _tidy(Path(trainer.ckpt_path).parent)
            strategy.barrier("what a killed run left is tidied up")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once the checkpoint callbacks know where they write."""
        folders = {getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks}
        for folder in folders:
            if folder is not None and trainer.is_global_zero and _is_local(folder):
                _tidy(Path(folder))


def _tidy(folder: Path) -> None:
    """Remove a killed run's temporaries, and put back a checkpoint that it was about to replace."""
    put_back(folder)
    for partial in folder.glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError):
            if time.time() - _last_write(partial) > _LEFT_OVER_AFTER:
                discard(partial)


def _last_write(path: Path) -> float:
    """When a file, or any file of a folder, was last written to, as `time.time` counts."""
    parts = [path, *(path.iterdir() if path.is_dir() else [])]
    return max(part.stat().st_mtime for part in parts)


def _is_local(path: str | Path) -> bool:
    return isinstance(url_to_fs(str(path))[0], LocalFileSystem)
