"""Checkpoints that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO

__all__ = ["AtomicCheckpointIO", "WholeCheckpoints", "discard", "partial_name", "put_in_place", "unwritable"]

_PARTIAL, _PREVIOUS = ".partial", ".previous"
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


def partial_name(target: Path) -> Path:
    """Where a checkpoint is written until it is whole; the next attempt writes there too."""
    return target.with_name(f".{target.name}{_PARTIAL}")


def put_in_place(scratch: Path, target: Path) -> None:
    """Give a whole checkpoint its name, in place of an older one; files or folders."""
    if scratch.is_dir():
        # A folder cannot be replaced at once. If the process dies between, the next run puts it back.
        previous = target.with_name(f".{target.name}{_PREVIOUS}")
        discard(previous)
        if target.exists() or target.is_symlink():
            target.rename(previous)
        scratch.rename(target)
        _flush_folder(target.parent)
        discard(previous)
    else:
        scratch.replace(target)  # refused where a folder stands
        _flush_folder(target.parent)


def discard(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def unwritable(target: Path, error: Exception) -> Exception:
    """The error for a checkpoint that cannot be written; the same error where writing is not its cause."""
    reason = _system_error(error)
    if reason is not None:
        number, words = reason.errno, reason.strerror
    elif isinstance(error, RuntimeError):
        # torch's writer speaks of positions in a file, and errors of other ranks come without their causes.
        free = shutil.disk_usage(target.parent).free
        number, words = errno.EIO, f"{error} ({free:,} bytes were free there)"
    else:
        return error
    return OSError(
        number,
        f"the checkpoint could not be written: {words}. Older ones are as they were. Make room, or write "
        "elsewhere (`default_root_dir` of the trainer, `dirpath` of ModelCheckpoint), and resume from the "
        "last one",
        str(target),
    )


def _tidy(folder: Path) -> None:
    """Remove a killed run's temporaries, and put back a checkpoint that it was about to replace."""
    for previous in folder.glob(f".*{_PREVIOUS}"):
        target = folder / previous.name.removeprefix(".").removesuffix(_PREVIOUS)
        with contextlib.suppress(OSError):
            discard(previous) if target.exists() else previous.rename(target)
    for partial in folder.glob(f".*{_PARTIAL}"):
        with contextlib.suppress(OSError):
            if time.time() - _last_write(partial) > _LEFT_OVER_AFTER:
                discard(partial)


def _last_write(path: Path) -> float:
    """When a file, or any file of a folder, was last written to, as `time.time` counts."""
    parts = [path, *(path.iterdir() if path.is_dir() else [])]
    return max(part.stat().st_mtime for part in parts)


def _flush_folder(folder: Path) -> None:
    """Make a renaming survive a loss of power, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's own error behind one of torch's."""
    while error is not None and not (isinstance(error, OSError) and error.errno is not None):
        error = error.__cause__ or error.__context__
    return error


def _is_local(path: str | Path) -> bool:
    return isinstance(url_to_fs(str(path))[0], LocalFileSystem)
