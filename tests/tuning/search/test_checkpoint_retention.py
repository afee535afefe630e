from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem

from lightning_dpo.tuning import Objective, SearchSpace
from lightning_dpo.tuning.search.checkpoint_retention import (
    NewestCheckpoints,
    checkpoint_plan,
    retention,
)
from lightning_dpo.tuning.search.schedulers import make_scheduler
from lightning_dpo.tuning.trial.checkpoints import CheckpointPlan

PBT = "ray.tune.schedulers.PopulationBasedTraining"


def test_the_newest_checkpoints_of_a_trial_stay(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"checkpoint_{number:06d}").mkdir()
    (tmp_path / "params.json").touch()
    storage = SimpleNamespace(storage_filesystem=LocalFileSystem(), trial_fs_path=str(tmp_path))
    NewestCheckpoints(2).on_checkpoint(1, [], SimpleNamespace(storage=storage), None)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint_000010", "checkpoint_000011", "params.json"]


@pytest.mark.parametrize(("scheduler", "kept"), [("pbt", None), ({"class_path": PBT}, None), ("asha", 4)])
def test_tune_removes_no_checkpoint_that_trials_exchange(scheduler: Any, kept: int | None) -> None:
    space = SearchSpace.parse({"model.optimizer.lr": {"uniform": [0.0, 1.0]}})
    built = make_scheduler(scheduler, space=space, objective=Objective.parse("m"))
    settings, callbacks = retention(built)
    assert settings.num_to_keep == kept
    assert len(callbacks) == (kept is None)
    assert all(isinstance(callback, NewestCheckpoints) for callback in callbacks)


def _built(scheduler: Any) -> Any:
    space = SearchSpace.parse({"model.optimizer.lr": {"uniform": [0.0, 1.0]}})
    return make_scheduler(scheduler, space=space, objective=Objective.parse("m"))


@pytest.mark.parametrize("scheduler", ["none", "asha", "ray.tune.schedulers.FIFOScheduler"])
def test_where_trials_are_only_stopped_weights_alone_are_the_rule(scheduler: str) -> None:
    assert checkpoint_plan(_built(scheduler), full_state_every=None) == CheckpointPlan(full_state_every=4)
    assert checkpoint_plan(_built(scheduler), full_state_every=0).full_state_every == 0


@pytest.mark.parametrize(
    ("scheduler", "kept"),
    [("hyperband", 1), ("pbt", 4), ("median", 1), ("sweep_faults.Meddler", 1)],
)
def test_where_a_trial_may_go_on_from_any_report_each_has_a_full_state(scheduler: Any, kept: int) -> None:
    plan = CheckpointPlan(full_state_every=1, kept_states=kept, is_exchanged=True)
    for every in (None, 1):
        assert checkpoint_plan(_built(scheduler), full_state_every=every) == plan
    with pytest.raises(ValueError, match=r"`full_state_every` must be 1 with .*; got 2. Leave it out"):
        checkpoint_plan(_built(scheduler), full_state_every=2)
