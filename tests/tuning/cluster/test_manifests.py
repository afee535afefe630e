from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from lightning_dpo.tuning.cluster.connect import trials_at_once
from lightning_dpo.tuning.cluster.resources import Resources

MANIFESTS = Path(__file__).parents[3] / "tuning" / "cluster"


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
