"""Checkpoints that are written while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

__all__ = ["BackgroundSaver", "on_host"]


class BackgroundSaver:
    """Copies what a checkpoint holds to the host, and lets a thread write it with the trainer's CheckpointIO.

    One checkpoint is written at a time: its copy takes the host's memory once until it is written. Strategies
    that write a folder, each rank its part, do so at once, for their ranks have to talk to each other.

    Lightning's AsyncCheckpointIO copies tied weights twice, and tells of a failure with the next checkpoint.
    """

    def __init__(self) -> None:
        """Begin with nothing to write; the thread starts with the first checkpoint."""
        self._thread: ThreadPoolExecutor | None = None
        self._job: Future[None] | None = None

    def save(
        self,
        trainer: pl.Trainer,
        path: Path,
        *,
        weights_only: bool = False,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Begin to write a checkpoint of this moment; every rank must call this.

        Args:
            trainer: Lightning's, while it fits.
            path: Where to.
            weights_only: Leave out what only a resumed run needs, such as the optimizer's state.
            then: Called on each rank when its part of the checkpoint is whole: in the thread, or before this
                returns where there is nothing to wait for.

        Raises:
            OSError: If this checkpoint or the one before cannot be written.
        """
        self.wait()
        strategy = trainer.strategy
        own = strategy.checkpoint_io
        taken = _Taken(own)
        strategy.checkpoint_io = taken
        try:
            trainer.save_checkpoint(path, weights_only=weights_only)
        finally:
            strategy.checkpoint_io = own
        if taken.arguments is None:
            if then is not None:
                then()
            return
        content, arguments = taken.content, taken.arguments

        def write() -> None:
            own.save_checkpoint(content, *arguments)
            if then is not None:
                then()

        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job = self._thread.submit(write)

    @property
    def is_done(self) -> bool:
        """Whether nothing is being written, be it that writing failed."""
        return self._job is None or self._job.done()

    def wait(self) -> None:
        """Return when what was begun is whole.

        Raises:
            OSError: If it could not be written, or whatever else went wrong in the thread.
        """
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Wait, and end the thread; raises what `wait` does."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None


class _Taken(CheckpointIO):
    """Takes over what a strategy gives it to write; all else goes to the strategy's own CheckpointIO."""

    def __init__(self, own: CheckpointIO) -> None:
        self._own = own
        self.content: dict[str, Any] = {}
        self.arguments: tuple[Any, ...] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        self.content, self.arguments = on_host(checkpoint), (path, storage_options)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._own.load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: str | Path) -> None:
        self._own.remove_checkpoint(path)


def on_host(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy of a checkpoint that training does not change; tensors that share memory share their copy.

    Args:
        checkpoint: Any nest of mappings and sequences with tensors, on any device.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place not in copies or not tensor.numel():
            copies[place] = tensor.detach().to("cpu", copy=True)
        return copies[place]

    copied: dict[str, Any] = apply_to_collection(checkpoint, torch.Tensor, copy)
    return copied
