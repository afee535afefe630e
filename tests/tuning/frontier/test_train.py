from __future__ import annotations

from typing import Any

import pytest

from lightning_dpo.tuning import SweepConfig
from lightning_dpo.tuning.frontier.train import sweeps_at_once


@pytest.mark.parametrize(
    ("nodes", "fields", "expected"),
    [
        ([{"CPU": 2}], {}, 2),
        ([{"CPU": 64}], {}, 2),
        ([{"CPU": 1}, {"CPU": 1}], {}, 2),
        ([{"CPU": 1}], {}, 1),
        ([{"CPU": 8, "GPU": 1}], {"gpus": 1}, 1),
        ([{"CPU": 8, "GPU": 1}], {"gpus": 0.5}, 2),
        ([{"CPU": 8}], {"concurrency": 1}, 1),
        ([{"CPU": 8}], {"workers": 2}, 1),
        ([{"CPU": 8}], {"packed_trials": 4}, 1),
    ],
)
def test_two_sweeps_share_a_cluster_of_two_trials_of_one_process(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], fields: dict[str, Any], expected: int
) -> None:
    monkeypatch.setattr("lightning_dpo.tuning.frontier.train.node_resources", lambda: nodes)
    sweeps = [SweepConfig(space={"seed_everything": 0}, **fields) for _ in range(3)]
    assert sweeps_at_once(sweeps) == expected
    assert sweeps_at_once(sweeps[:1]) == 1
    assert sweeps_at_once([]) == 0
