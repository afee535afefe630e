"""A sweep whose storage is an object store, on a cluster that was started without its credentials."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from sweep_project import settings

from lightning_dpo.tuning.results.folder import load_result

TESTS = Path(__file__).parents[1] / "support"

PROGRAM = """
import json, os, sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
os.environ.update(json.loads(sys.argv[1]))
from lightning_dpo.cli.main import main
main(["tune", *sys.argv[2:], "--ray_address", cluster.address])
cluster.shutdown()
"""


def _start(*arguments: str) -> subprocess.Popen[str]:
    store = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    environment = {name: value for name, value in os.environ.items() if name not in store}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(store), *arguments],
        env={**environment, "PYTHONPATH": f"{TESTS.parents[1]}{os.pathsep}{TESTS}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.heavy
@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_in_a_bucket(bucket: Any, project: Path, tmp_path: Path, workers: int) -> None:
    slow = {"class_path": "sweep_faults.Slow", "init_args": {"seconds": 0.3}}
    sweep = {
        "space": {"model.optimizer.lr": {"grid": [1e-4, 1e-3, 3e-3]}},
        "samples": 1,
        "search": "grid",
        "concurrency": 1,
        "workers": workers,
        "cpus": 0.9,
        **settings(project, overrides={"trainer.callbacks": [slow], "data.batch_size": 4 // workers}),
        "storage": "s3://bucket/sweeps",
    }
    (tmp_path / "stored.yaml").write_text(yaml.safe_dump(sweep))
    config = f"--config={tmp_path / 'stored.yaml'}"

    def records() -> list[dict[str, Any]]:
        bucket.invalidate_cache()
        paths = bucket.glob("bucket/sweeps/stored/trials/*.json")
        return [json.loads(bucket.cat_file(path)) for path in paths]

    first = _start(config)
    deadline = time.monotonic() + 150
    while not any(record["status"] == "finished" for record in records()):
        assert first.poll() is None, first.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first.kill()
    first.communicate()
    finished = {record["id"] for record in records() if record["status"] == "finished"}

    second = _start(config, "--resume")
    assert second.wait(timeout=200) == 0, second.communicate()[0][-3000:]
    result = load_result("s3://bucket/sweeps/stored")
    assert [trial.status for trial in result.trials] == ["finished"] * 3, [t.reason for t in result.trials]
    for trial in result.trials:
        assert [entry["step"] for entry in trial.history] == [2, 4, 6]
        if trial.id in finished:
            assert trial.starts == 1
    assert result.reference_passes == 1
    with bucket.open("bucket/sweeps/stored/results.parquet") as file:
        assert pq.read_table(file).num_rows == 9
    assert result.recipe.encode() == bucket.cat_file("bucket/sweeps/stored/best/config.yaml")
    assert {"config.json", "model.safetensors"} <= {
        path.rpartition("/")[2] for path in bucket.find("bucket/sweeps/stored/best/model")
    }
    report = bucket.cat_file("bucket/sweeps/stored/report.html")
    assert result.best.id.encode() in report

    bucket.rm("bucket/sweeps/stored/report.html")
    command = [sys.executable, "-c", "from lightning_dpo.cli.main import main; main()"]
    done = subprocess.run([*command, "report", result.location], capture_output=True, text=True, timeout=60)
    assert "s3://bucket/sweeps/stored/report.html" in done.stdout, done.stderr[-2000:]
    assert bucket.cat_file("bucket/sweeps/stored/report.html") == report
