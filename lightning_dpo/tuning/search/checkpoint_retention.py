"""Which checkpoints of trials stay: the newest one, or so many as population-based training may ask for."""

from __future__ import annotations

import math
import posixpath
from typing import Any

from pyarrow.fs import FileSelector
from ray.tune import Callback, CheckpointConfig
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

__all__ = ["NewestCheckpoints", "retention"]

_PREFIX = "checkpoint_"


class NewestCheckpoints(Callback):
    """Keeps the newest checkpoints of each trial.

    Tune's own `num_to_keep` removes a checkpoint that population-based training still counts on: the
    scheduler registers the same one twice, and the second entry goes with the first one's folder.
    """

    def __init__(self, number: int) -> None:
        """Keep so many of each trial."""
        self._number = number

    def on_checkpoint(
        self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any
    ) -> None:
        """Remove what is older."""
        files, folder = trial.storage.storage_filesystem, trial.storage.trial_fs_path
        found = [info.base_name for info in files.get_file_info(FileSelector(folder, allow_not_found=True))]
        for name in sorted(name for name in found if name.startswith(_PREFIX))[: -self._number]:
            files.delete_dir(posixpath.join(folder, name))


def retention(scheduler: TrialScheduler) -> tuple[CheckpointConfig, list[Callback]]:
    """How a sweep keeps checkpoints: Tune's own settings, and callbacks beside them.

    Args:
        scheduler: The sweep's scheduler.
    """
    if not isinstance(scheduler, PopulationBasedTraining):
        return CheckpointConfig(num_to_keep=1), []
    # A trial may still want the checkpoint that another one had when it was last compared.
    kept = 2 + math.ceil(scheduler._perturbation_interval)
    return CheckpointConfig(num_to_keep=None), [NewestCheckpoints(kept)]
