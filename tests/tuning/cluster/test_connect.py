from __future__ import annotations

import pytest

from lightning_dpo.tuning.cluster.connect import is_this_machine_alone, trials_at_once
from lightning_dpo.tuning.cluster.resources import Resources


def machines(count: int, **resources: float) -> list[dict[str, float]]:
    return [dict(resources) for _ in range(count)]


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "gpus", "expected"),
    [
        (machines(1, CPU=2), 1, 1, 0, 2),
        (machines(1, CPU=2), 2, 0.9, 0, 1),
        (machines(2, CPU=3), 2, 2, 0, 1),  # one worker fits each machine, not three in both
        (machines(8, CPU=64, GPU=8), 4, 4, 1, 16),
        (machines(8, CPU=8, GPU=8), 4, 1, 1, 14),  # any machine may have to hold the drivers
        (machines(1, CPU=64, GPU=8), 3, 1, 1, 2),
        (machines(1, CPU=64, GPU=2), 1, 1, 0.5, 4),
        (machines(1, CPU=64, GPU=1), 1, 1, 0.4, 2),
        (machines(1, CPU=64, GPU=3), 1, 1, 0.7, 3),  # no worker has parts of two GPUs
        (machines(1, CPU=4, GPU=8), 1, 2, 1, 2),
        (machines(1, CPU=4), 4, 1, 0, 0),  # nothing is left for the driver
        ([*machines(1, CPU=4), *machines(2, CPU=16, GPU=4)], 4, 3.9, 1, 2),
        ([*machines(1, CPU=4), *machines(2, CPU=16, GPU=4)], 4, 4, 1, 1),  # were a driver on the wrong one
    ],
)
def test_trials_at_once(
    nodes: list[dict[str, float]], workers: int, cpus: float, gpus: float, expected: int
) -> None:
    resources = Resources(workers, cpus, gpus)
    if expected == 0:
        with pytest.raises(ValueError, match="must fit the cluster"):
            trials_at_once(nodes, resources)
    else:
        assert trials_at_once(nodes, resources) == expected


@pytest.mark.heavy
def test_a_cluster_that_is_this_machine(cluster: None) -> None:
    assert is_this_machine_alone()
