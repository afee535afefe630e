from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem

from lightning_dpo.tuning import SweepConfig, run
from lightning_dpo.tuning.recipe import Recipe
from lightning_dpo.tuning.search.pbt_checkpoints import KeepNewest
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.fit import TrialPlan


def test_the_newest_checkpoints_of_a_trial_stay(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"checkpoint_{number:06d}").mkdir()
    (tmp_path / "params.json").touch()
    storage = SimpleNamespace(storage_filesystem=LocalFileSystem(), trial_fs_path=str(tmp_path))
    KeepNewest(2).on_checkpoint(1, [], SimpleNamespace(storage=storage), None)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint_000010", "checkpoint_000011", "params.json"]


@pytest.mark.parametrize(("scheduler", "kept"), [("pbt", None), ("asha", 1)])
def test_tune_removes_no_checkpoint_that_trials_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str, kept: int | None
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(run, "Tuner", lambda trainable, **kwargs: given.update(kwargs))
    config = SweepConfig(space={"model.optimizer.lr": {"uniform": [0.0, 1.0]}}, scheduler=scheduler)
    plan = TrialPlan(Recipe(), config.search_space(), config.goals(), str(tmp_path), "")
    monkeypatch.setattr(run, "_trainable", lambda plan: None)
    table: Any = SimpleNamespace(callback=None)
    run._tuner(plan, config, Storage(tmp_path / "new"), table, concurrency=1, resume=False)
    assert given["run_config"].checkpoint_config.num_to_keep == kept
    prunes = [callback for callback in given["run_config"].callbacks if isinstance(callback, KeepNewest)]
    assert len(prunes) == (scheduler == "pbt")
