"""The best trial's model, as a Hugging Face folder in the sweep's storage."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightning_dpo.training.export import export_checkpoint
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.report_callback import CHECKPOINT

__all__ = ["export_best"]


def export_best(result: SweepResult) -> str | None:
    """Export the best trial's last checkpoint.

    Returns:
        Where the model is; None where there is no checkpoint in one file.
    """
    path = result.best.checkpoint
    if path is None:
        return None
    storage = Storage(result.location)
    with tempfile.TemporaryDirectory() as scratch:
        fetched = Path(scratch) / "checkpoint"
        if storage.is_local:
            fetched = Path(path)
        else:
            storage.fetch(path, fetched)
        if not (fetched / CHECKPOINT).is_file():
            return None
        model = export_checkpoint(fetched / CHECKPOINT, Path(scratch) / "model")
        return storage.put(model, "best/model")
