from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_dpo.tuning.results import export
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.checkpoints import CHECKPOINT


def test_the_model_of_a_sweep_that_was_moved_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[Path] = []

    def note(file: Path, folder: Path) -> Any:
        exported.append(file)
        return folder

    monkeypatch.setattr(export, "export_checkpoint", note)
    before, after = tmp_path / "sweep", tmp_path / "moved"
    checkpoint = before / "checkpoints/a_00000/1_000004.weights"
    checkpoint.mkdir(parents=True)
    (checkpoint / CHECKPOINT).touch()
    before.rename(after)
    model = export.export_trial(Storage(after), str(checkpoint), tmp_path / "model")
    assert model == tmp_path / "model"
    assert exported == [after / "checkpoints/a_00000/1_000004.weights" / CHECKPOINT]
    assert export.export_trial(Storage(tmp_path / "other"), str(checkpoint), tmp_path / "model") is None
