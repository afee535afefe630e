from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sweep_project import settings

from lightning_dpo.tuning.results.folder import load_result

TESTS = Path(__file__).parents[2] / "support"


TWO_NODES = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from lightning_dpo.tuning import SweepConfig, sweep
from lightning_dpo.tuning.cluster.connect import connected, is_this_machine_alone

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
with connected(cluster.address):
    assert not is_this_machine_alone()
config = SweepConfig(**json.loads(sys.argv[1]), ray_address=cluster.address)
sweep(config, verbose=False)
cluster.shutdown()
"""


@pytest.mark.heavy
def test_real_trials_on_two_nodes(project: Path, tmp_path: Path) -> None:
    slow = {"class_path": "sweep_faults.Slow", "init_args": {"seconds": 0.3}}
    given = {
        "space": {"model.optimizer.lr": {"grid": [1e-4, 1e-3, 3e-3, 1e-2]}},
        "samples": 1,
        "name": "nodes",
        **settings(project, overrides={"trainer.callbacks": [slow], "data.cache_dir": None}),
        "storage": str(tmp_path),
    }
    own = tmp_path / "own"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{TESTS.parents[1]}{os.pathsep}{TESTS}",
        "LIGHTNING_DPO_CACHE": str(own),
    }
    done = subprocess.run(
        [sys.executable, "-c", TWO_NODES, json.dumps(given)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = load_result(str(tmp_path / "nodes"))
    assert [trial.status for trial in result.trials] == ["finished"] * 4
    assert len({trial.extra["node"] for trial in result.trials}) == 2
    assert len(result.environment["machines"]) == 2

    # Both machines computed a part of the reference's pass, and trials none.
    preparation = list((tmp_path / "nodes/preparation").iterdir())
    shares = [json.loads(path.read_text()) for path in preparation]
    assert {share["node"] for share in shares} == {trial.extra["node"] for trial in result.trials}
    assert all(share["batches"] > 0 for share in shares)
    assert result.reference_passes == 1
    assert all(trial.reference_passes == 0 for trial in result.trials)

    # The data were tokenised before any trial, for both machines.
    (tokenised,) = (tmp_path / "nodes/data").rglob("pairs.arrow")
    assert tokenised.stat().st_mtime < min(path.stat().st_mtime for path in preparation)
    assert not list(own.rglob("pairs.arrow"))
    assert "cache_dir: null" in result.recipe


@pytest.mark.heavy
def test_64_trials_of_4_workers_on_64_gpus_and_the_loss_of_a_machine(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, TESTS / "simulate_cluster.py", tmp_path],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[7:])
    assert found["trials_at_once"] == 14
    assert (found["finished"], found["errors"]) == (64, 0)
    assert 1 < found["peak"] <= 14
    assert found["longest_wait"] < 30
    assert found["busiest_machine"] <= 8
    assert found["machines_used"] == 8
    assert found["lost_a_machine"]
    assert found["after_the_loss"] > 0
