from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sweep_project import settings

from lightning_dpo.tuning import SweepConfig
from lightning_dpo.tuning.cluster import prepare
from lightning_dpo.tuning.cluster.prepare import reference_pass_resources
from lightning_dpo.tuning.cluster.resources import Resources
from lightning_dpo.tuning.run import _checked_spec


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
