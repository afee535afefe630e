"""Checkpoint folders, which every rank writes a part of, appear whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.api import CheckpointException

from lightning_dpo.files import current_name, discard, partial_name, put_in_place
from lightning_dpo.parallel.checkpoints import METADATA, on_rank_zero, unwritable

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy as _Base
else:
    _Base = object

__all__ = ["WholeFolders"]


class WholeFolders(_Base):
    """Makes a strategy write its folders beside their place; rank 0 renames one when all parts are there.

    To be named before the strategy among a class's bases.
    """

    @property
    def _saves_folders(self) -> bool:
        """Whether ranks write their own parts."""
        raise AssertionError("the strategy says")

    def load_checkpoint(self, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a folder; one that a killed run had put aside may have been put back since it was found."""
        return super().load_checkpoint(current_name(Path(self.broadcast(checkpoint_path))), *args, **kwargs)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; every rank must call this.

        Args:
            checkpoint: This rank's part.
            filepath: Where to; rank 0's counts.
            storage_options: Not supported, as in Lightning's own.

        Raises:
            OSError: If a rank cannot write, as on a full disk; what was there still is.
        """
        target = Path(self.broadcast(filepath))
        if not self._saves_folders or storage_options is not None or _holds_more(target):
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        scratch = partial_name(target)
        on_rank_zero(self, lambda: discard(scratch))
        failure: Exception | None = None
        try:
            super().save_checkpoint(checkpoint, scratch)
        except CheckpointException as error:  # no Exception; it holds those of all ranks
            failure = next((one for one, _ in error.failures.values() if isinstance(one, Exception)), None)
            failure = failure or OSError(str(error))
        except Exception as error:
            failure = error
        explained = None if failure is None else unwritable(target, failure)
        if not self.reduce_boolean_decision(failure is None):
            on_rank_zero(self, lambda: discard(scratch))
            raise explained or OSError(f"another rank could not write its part of {target}") from failure
        on_rank_zero(self, lambda: put_in_place(scratch, target))


def _holds_more(folder: Path) -> bool:
    """Whether a folder has something in it besides a checkpoint; it is then written into, not replaced."""
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    return any(name not in (METADATA, ".metadata") and not name.endswith(".distcp") for name in names)
