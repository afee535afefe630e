"""The weights of a checkpoint folder, read by name: what was not asked for is not in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_dpo.parallel.checkpoints import METADATA

__all__ = ["FolderReader"]

_PREFIX = "state_dict."


class FolderReader:
    """A checkpoint that ranks wrote in parts, in one process.

    Attributes:
        content: What the checkpoint holds besides weights and the optimizer's state.
        empty: Weights by their names in the module, with shape and type and no memory.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder; no weights are read.

        Args:
            folder: What the trainer saved under FSDP2.

        Raises:
            ValueError: If the folder is no such checkpoint.
        """
        if not (folder / METADATA).is_file():
            raise ValueError(
                f"`checkpoint` must be a file or folder that the trainer saved, got {str(folder)!r}"
            )
        self.content: dict[str, Any] = torch.load(folder / METADATA, weights_only=True, map_location="cpu")
        self._reader = _Reader(folder)
        stored = self._reader.read_metadata().state_dict_metadata
        self.empty = {
            key.removeprefix(_PREFIX): torch.empty(
                entry.size, dtype=entry.properties.dtype, device=torch.device("meta")
            )
            for key, entry in stored.items()
            if key.startswith(_PREFIX) and isinstance(entry, TensorStorageMetadata)
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some weights, whole; beside them one part of one weight is in memory at a time.

        Args:
            names: Of `empty`.
        """
        state = {name: torch.empty_like(self.empty[name], device="cpu") for name in names}
        with warnings.catch_warnings():
            # One process is what is wanted.
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            load({_PREFIX[:-1]: state}, storage_reader=self._reader, no_dist=True)
        return state


class _Reader(FileSystemReader):
    """Reads what says where everything is once, and not each time that something is read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Where parts of weights are."""
        if self._index is None:
            self._index = super().read_metadata(*args, **kwargs)
        return self._index
