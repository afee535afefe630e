"""What a trial's process goes on from, and what is removed when nobody will go on from it any more."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lightning_dpo.tuning.trial.best_step import KeptStep
from lightning_dpo.tuning.trial.checkpoints import SavedFolder, saved_report
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.report_callback import Saved
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["Beginning", "after_report", "begin_from", "begun", "remove_spent"]


class Beginning(NamedTuple):
    """What a process of a trial goes on from.

    Attributes:
        folder: A local folder with a full state; None where training begins anew.
        owner: The trial that it is of: another one where a scheduler hands states on.
        location: The state's folder in the sweep's storage.
    """

    folder: Path | None
    owner: str
    location: str | None = None

    @property
    def saved(self) -> dict[str, Any] | None:
        """What was reported with the state."""
        return None if self.folder is None else saved_report(self.folder)


@contextlib.contextmanager
def begin_from(spec: TrialSpec, owner: str, pointed: SavedFolder | None = None) -> Iterator[Beginning]:
    """Open the full state that training goes on from.

    Args:
        spec: What the sweep's trials have in common.
        owner: The trial that it is of.
        pointed: The state that is meant; where it is not there any more, what followed it: the newest one.
    """
    store = spec.checkpoints
    found = pointed if pointed in store.whole(owner) else store.newest_state(owner)
    if found is None:
        yield Beginning(None, owner)
        return
    with store.opened(owner, found) as folder:
        yield Beginning(folder, owner, store.location(owner, found))


def begun(spec: TrialSpec, record: TrialRecord, beginning: Beginning) -> TrialRecord:
    """The record at the start of a process; it says how many steps are run again.

    Args:
        spec: What the sweep's trials have in common.
        record: What was known of the trial.
        beginning: What it goes on from.
    """
    started = record.restarted(beginning.saved, is_own=beginning.owner == record.id)
    kept = _kept_on_disk(spec, record)
    return replace(started, checkpoint=beginning.location, kept=kept)


def after_report(spec: TrialSpec, record: TrialRecord, metrics: dict[str, Any], saved: Saved) -> TrialRecord:
    """The record after a report whose checkpoint is whole.

    Args:
        spec: What the sweep's trials have in common.
        record: What was known of the trial.
        metrics: What is reported.
        saved: What was saved with it.
    """
    model = saved.folder if saved.kept is None else SavedFolder.parse(saved.kept.folder)
    location = None if model is None else spec.checkpoints.location(record.id, model)
    return record.reported(metrics, checkpoint=location, kept=saved.kept)


def remove_spent(spec: TrialSpec, trial: str, models: Collection[str | None]) -> None:
    """Remove the checkpoints of a trial that is over, but those that are models.

    Args:
        spec: What the sweep's trials have in common.
        trial: The trial.
        models: Folders of checkpoints that trials keep, as their records have them. The sweep's folder may
            have been moved since, so a trial's name and a folder's name are what counts.
    """
    store = spec.checkpoints
    names = {tuple(model.rstrip("/").split("/")[-2:]) for model in models if model is not None}
    store.remove_others(trial, [one for one in store.whole(trial) if (trial, one.name) in names])


def _kept_on_disk(spec: TrialSpec, record: TrialRecord) -> KeptStep | None:
    """The best step of earlier processes, if its weights are there."""
    if record.kept is None or not spec.keeps_best:
        return None
    return record.kept if SavedFolder.parse(record.kept.folder) in spec.checkpoints.whole(record.id) else None
