"""Which checkpoints are full states and which of them stay: as many as the scheduler may ask for."""

from __future__ import annotations

import math
import posixpath
from typing import Any

from pyarrow.fs import FileSelector
from ray.tune import Callback, CheckpointConfig
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from lightning_dpo.tuning.search.pruning import PrunerScheduler
from lightning_dpo.tuning.trial.checkpoints import CheckpointPlan

__all__ = ["NewestCheckpoints", "checkpoint_plan", "retention"]

_PREFIX = "checkpoint_"

_FULL_STATE_EVERY = 4

_POINTERS = 4
"""Pointers to full states that Tune keeps of each trial. With so many new ones of a trial it writes the
state of all trials at once and waits for that: were it 1, each trial of a sweep would make it do so."""


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


def checkpoint_plan(scheduler: TrialScheduler, *, full_state_every: int | None) -> CheckpointPlan:
    """When trials keep all that a resumed run needs, and how many such states stay.

    A trial is resumed where its process died, or that of the sweep; where a scheduler paused it; and where it
    takes over another one's state. Ray's asynchronous scheduler and a study's pruner stop trials and do
    neither of the two; the median rule pauses trials until there are others to compare them with; of others
    nothing is known, so that any report may be gone on from.

    Args:
        scheduler: The sweep's scheduler.
        full_state_every: The sweep's setting.

    Raises:
        ValueError: If it leaves out states that the scheduler may ask for.
    """
    if type(scheduler) in (FIFOScheduler, AsyncHyperBandScheduler, PrunerScheduler):
        every = _FULL_STATE_EVERY if full_state_every is None else full_state_every
        return CheckpointPlan(full_state_every=every)
    if full_state_every not in (None, 1):
        raise ValueError(
            f"`full_state_every` must be 1 with {type(scheduler).__name__}, which may pause a trial or hand "
            f"its state on at any report; got {full_state_every}. Leave it out, or use none or asha"
        )
    kept = _exchanged(scheduler) if isinstance(scheduler, PopulationBasedTraining) else 1
    return CheckpointPlan(full_state_every=1, kept_states=kept, is_exchanged=True)


def retention(scheduler: TrialScheduler) -> tuple[CheckpointConfig, list[Callback]]:
    """How Tune keeps what it is given as checkpoints: its own settings, and callbacks beside them.

    Args:
        scheduler: The sweep's scheduler.
    """
    if not isinstance(scheduler, PopulationBasedTraining):
        return CheckpointConfig(num_to_keep=_POINTERS), []
    return CheckpointConfig(num_to_keep=None), [NewestCheckpoints(_exchanged(scheduler))]


def _exchanged(scheduler: PopulationBasedTraining) -> int:
    """Checkpoints of each trial that stay: another one may still want that of the last comparison."""
    return 2 + math.ceil(scheduler._perturbation_interval)
