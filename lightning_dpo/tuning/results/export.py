"""Trials' models, as Hugging Face folders."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightning_dpo.training.saving.export import export_checkpoint
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.checkpoints import CHECKPOINT
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["export_to_sweep", "export_trial"]


def export_to_sweep(result: SweepResult, trial: TrialRecord, name: str) -> str | None:
    """Export a trial's checkpoint, the last one or that of the step that it kept, to the sweep's folder.

    Args:
        result: The sweep.
        trial: One of its trials.
        name: Place in the sweep's folder, such as "best/model".

    Returns:
        Where the model is; None where there is no checkpoint in one file.
    """
    storage = Storage(result.location)
    with tempfile.TemporaryDirectory() as scratch:
        model = export_trial(storage, trial.checkpoint, Path(scratch) / "model")
        return None if model is None else storage.put(model, name)


def export_trial(storage: Storage, checkpoint: str | None, folder: Path) -> Path | None:
    """Export the model of a trial's checkpoint to a local folder.

    Args:
        storage: The sweep's.
        checkpoint: Folder of the checkpoint, as the trial's record has it.
        folder: Where to; must not exist.

    Returns:
        The folder; None where there is no checkpoint in one file.
    """
    if checkpoint is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        fetched = Path(checkpoint)
        if storage.is_local and not fetched.is_dir():  # the sweep's folder was moved since
            fetched = Path(storage.path, "checkpoints", fetched.parent.name, fetched.name)
        if not storage.is_local:
            fetched = Path(scratch) / "checkpoint"
            storage.fetch(checkpoint, fetched)
        if not (fetched / CHECKPOINT).is_file():
            return None
        return export_checkpoint(fetched / CHECKPOINT, folder)
