"""What a group of workers has reserved, when the process that drives it dies before they have started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from sweep_project import settings

from lightning_dpo.tuning import SweepConfig
from lightning_dpo.tuning.run import _checked_spec
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.workers.group import Group
from lightning_dpo.tuning.workers.placement_release import orphaned_placements


def held() -> list[str]:
    """The ids of the placement groups that hold resources or wait for them."""
    return [name for name, group in placement_group_table().items() if group["state"] != "REMOVED"]


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, placement_group_table()
        time.sleep(0.05)


@pytest.mark.heavy
def test_a_driver_that_dies_before_its_workers_start_leaves_no_reservation(
    cluster: None, project: Path
) -> None:
    config = SweepConfig(
        space={"model.optimizer.lr": {"grid": [1e-3]}},
        workers=2,
        cpus=0.9,
        name="window",
        **settings(project),
    )
    spec = _checked_spec(config, module=None, data=None)

    class Driver:
        """Drives a group, as the process that Tune gives a trial does."""

        def begin(self, spec: TrialSpec) -> int:
            self.group = Group(spec)
            return os.getpid()

    before = held()
    others = placement_group([{"CPU": 0.01}])  # of this process, and not to be touched
    driver: Any = ray.remote(num_cpus=0)(Driver).remote()
    pid = ray.get(driver.begin.remote(spec))
    wait_until(lambda: len(held()) == len(before) + 2, seconds=60)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(held()) == len(before) + 1, seconds=20)
    assert others.id.hex() in held()
    assert not orphaned_placements()
    remove_placement_group(others)
