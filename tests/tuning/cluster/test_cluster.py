from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from sweep_project import settings

from lightning_dpo.tuning.cluster.connect import trials_at_once
from lightning_dpo.tuning.cluster.prepare import reference_pass_resources
from lightning_dpo.tuning.resources import Resources
from lightning_dpo.tuning.results.result import load_result

MANIFESTS = Path(__file__).parents[3] / "tuning" / "cluster"
TESTS = Path(__file__).parents[2] / "support"


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


def test_the_autoscalers_cluster_has_its_schema() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((MANIFESTS / "autoscaler.yaml").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "max_worker": 1}, schema)
    kinds = cluster["available_node_types"]
    assert cluster["head_node_type"] in kinds
    sweep = yaml.safe_load((MANIFESTS.parent / "cluster.yaml").read_text())
    nodes = [kinds["gpu"]["resources"]] * kinds["gpu"]["max_workers"]
    assert trials_at_once(nodes, Resources(sweep["workers"], sweep["cpus"], sweep["gpus"])) == 16


def test_the_kubernetes_cluster_has_what_kuberay_asks_for() -> None:
    cluster = yaml.safe_load((MANIFESTS / "kuberay.yaml").read_text())
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert cluster["spec"]["rayVersion"] == ray.__version__
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    for group in groups[1:]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    names = [port["name"] for port in groups[0]["template"]["spec"]["containers"][0]["ports"]]
    assert "gcs-server" in names


def test_the_slurm_script_starts_a_head_then_the_others_then_the_sweep(tmp_path: Path) -> None:
    commands = {
        "scontrol": "printf 'n1\\nn2\\nn3\\n'",
        "srun": '[[ "$*" == *hostname* ]] && echo 10.0.0.1 || echo "srun $*" >> "$LOG"',
        "ray": "printf 'node_1\\nnode_2\\nnode_3\\n'",
        "lightning-dpo": 'echo "sweep $*" >> "$LOG"',
    }
    for name, body in commands.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    log = tmp_path / "log"
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(log),
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_CPUS_PER_TASK": "32",
        "SLURM_GPUS_ON_NODE": "4",
    }
    subprocess.run(["bash", MANIFESTS / "slurm.sh", "--resume"], env=environment, check=True, timeout=30)
    lines = log.read_text().splitlines()
    starts = sorted(line for line in lines if line.startswith("srun"))
    assert len(starts) == 3
    assert "-w n1" in starts[0]
    assert "--head --node-ip-address=10.0.0.1 --port=6379" in starts[0]
    assert all("--address=10.0.0.1:6379" in line and "--num-gpus=4" in line for line in starts[1:])
    assert any(
        line == "sweep tune --config tuning/cluster.yaml --ray_address 10.0.0.1:6379 --resume"
        for line in lines
    )


TWO_NODES = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from lightning_dpo.tuning import SweepConfig, sweep

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
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
