from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import ray
import torch
from sweep_project import settings

from lightning_dpo.tuning import SweepConfig
from lightning_dpo.tuning.cluster import prepare, task
from lightning_dpo.tuning.cluster.prepare import reference_pass_resources
from lightning_dpo.tuning.cluster.resources import Resources
from lightning_dpo.tuning.run import _checked_spec
from lightning_dpo.tuning.trial.spec import TrialSpec


def machines(count: int, **resources: float) -> list[dict[str, float]]:
    return [dict(resources) for _ in range(count)]


@pytest.mark.parametrize(
    ("nodes", "trial", "expected"),
    [
        (machines(1, CPU=2), {}, None),  # the start of a group costs more than it gains
        (machines(3, CPU=2), {}, (3, 0)),
        (machines(3, CPU=2), {"workers": 2, "cpus": 2}, (3, 0)),
        (machines(1, CPU=2), {"workers": 2}, (2, 0)),
        (machines(2, CPU=64, GPU=8), {"gpus": 1}, (16, 1)),
        (machines(2, CPU=64, GPU=8), {"gpus": 0.5, "cpus": 16}, (8, 1)),
        ([*machines(1, CPU=8), *machines(1, CPU=8, GPU=1)], {"gpus": 1}, None),
        (machines(1, CPU=8, GPU=2), {"gpus": 2}, None),
    ],
)
def test_the_references_pass_takes_the_whole_cluster(
    nodes: list[dict[str, float]], trial: dict[str, Any], expected: tuple[int, float] | None
) -> None:
    group = reference_pass_resources(Resources(**trial), nodes)
    assert (None if group is None else (group.workers, group.gpus)) == expected


@pytest.mark.parametrize(
    ("storage", "machines", "shared"),
    [("memory://bucket", 2, "memory://bucket/shared/data"), ("memory://bucket", 1, None)],
)
def test_machines_share_tokens_through_the_storage_url(
    project: Path, monkeypatch: pytest.MonkeyPatch, storage: str, machines: int, shared: str | None
) -> None:
    monkeypatch.setattr(prepare, "node_resources", lambda: [{"CPU": 1.0}] * machines)
    given = settings(project, overrides={"data.cache_dir": None}, storage=storage)
    config = SweepConfig(space={"model.optimizer.lr": {"grid": [1e-3]}}, name="shared", **given)
    spec = _checked_spec(config, module=None, data=None)
    expected = {} if shared is None else {"data.cache_dir": shared}
    assert prepare._shared_data(spec, spec.recipe.parse()) == expected


def _where(spec: TrialSpec, wrong: bool = False) -> tuple[int, float]:
    """The process that this runs in, once its random state and its seed are others."""
    pl.seed_everything(3, verbose=False)
    if wrong:
        raise ValueError("nothing to prepare")
    return os.getpid(), float(torch.rand(()))


@pytest.mark.parametrize(
    ("gpus", "is_alone", "is_here"), [(0, True, True), (1, True, False), (0, False, False)]
)
def test_preparation_runs_here_where_trials_do(
    monkeypatch: pytest.MonkeyPatch, gpus: float, is_alone: bool, is_here: bool
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    handed_over: list[Any] = []
    monkeypatch.setattr(task, "is_this_machine_alone", lambda: is_alone)
    monkeypatch.setattr(task, "run_as_task", lambda spec, function, *_: handed_over.append(function))
    spec: Any = SimpleNamespace(resources=Resources(gpus=gpus))
    before = torch.get_rng_state()
    found = task.run_preparation(spec, _where)
    assert (found is not None and found[0] == os.getpid()) == is_here
    assert handed_over == ([] if is_here else [_where])
    assert torch.equal(torch.get_rng_state(), before)
    assert "PL_GLOBAL_SEED" not in os.environ
    if is_here:
        with pytest.raises(ValueError, match="the recipe does not run: nothing to prepare"):
            task.run_preparation(spec, _where, True)


def leaves_its_process(folder: Path) -> Any:
    """A function that writes its process down; within another, so that a worker needs no module of tests."""

    def leave(name: str) -> None:
        (folder / name).write_text(str(os.getpid()))

    return leave


def test_calls_run_in_turn_where_ray_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    task.run_side_by_side(leaves_its_process(tmp_path), [("a",), ("b",)])
    assert [path.read_text() for path in tmp_path.iterdir()] == [str(os.getpid())] * 2


@pytest.mark.heavy
def test_calls_run_side_by_side_where_ray_has_this_machine(cluster: None, tmp_path: Path) -> None:
    task.run_side_by_side(leaves_its_process(tmp_path), [("a",), ("b",)])
    found = [path.read_text() for path in tmp_path.iterdir()]
    assert len(found) == 2
    assert str(os.getpid()) not in found
