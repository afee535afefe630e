"""64 trials of 4 workers on 8 simulated machines of 8 made-up GPUs each, one of which is lost on the way.

Run it as a program; it prints what happened as JSON. Workers hold their resources and compute nothing, so
that placement is all that is tested, on any machine.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from lightning_dpo.tuning.cluster.connect import node_resources, trials_at_once
from lightning_dpo.tuning.cluster.resources import Resources
from lightning_dpo.tuning.cluster.retry import fit_with_retries

NODES, GPUS, WORKERS, TRIALS = 8, 8, 4, 64
AT_ONCE = 14  # groups that all machines hold beside their drivers


def hold(mark: Path, *, trials: int, seconds: float) -> None:
    """Wait until so many trials hold their workers at the same time, this one among them, or for so long."""
    mark.touch()
    deadline = time.monotonic() + seconds
    while len(list(mark.parent.glob("*.holding"))) < trials and time.monotonic() < deadline:
        time.sleep(0.05)
    mark.unlink()


def trial(config: dict[str, Any], *, folder: str) -> None:
    """Take what a group of workers takes, all or nothing, and hold it while the others take theirs."""
    bundles = [{"CPU": 1.0, "GPU": 1.0}] * WORKERS
    asked = time.time()
    group = placement_group(bundles, strategy="PACK")
    ray.get(group.ready())
    began = time.time()
    nodes = list(placement_group_table(group)["bundles_to_node_id"].values())
    hold(Path(folder) / f"{config['number']}-{os.getpid()}.holding", trials=AT_ONCE, seconds=1.0)
    remove_placement_group(group)
    record = {"waited": began - asked, "began": began, "ended": time.time(), "nodes": nodes}
    (Path(folder) / f"{config['number']}-{os.getpid()}-{began}.json").write_text(json.dumps(record))
    tune.report({"done": 1})


def main(folder: str) -> dict[str, Any]:
    """Run the simulation."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 0})
    machines = [cluster.add_node(num_cpus=GPUS, num_gpus=GPUS, wait=False) for _ in range(NODES)]
    cluster.wait_for_nodes()
    ray.init(cluster.address, log_to_driver=False)
    resources = Resources(workers=WORKERS, cpus=1, gpus=1)
    fits = trials_at_once(node_resources(), resources)
    lost: list[float] = []

    def lose_a_machine() -> None:
        while len(list(Path(folder).glob("*.json"))) < TRIALS // 3:
            time.sleep(0.2)
        cluster.remove_node(machines[-1], allow_graceful=False)
        lost.append(time.time())

    threading.Thread(target=lose_a_machine, daemon=True).start()
    storage = Path(folder) / "ray"
    began = time.time()
    trainable = tune.with_resources(
        tune.with_parameters(trial, folder=folder), {"cpu": resources.driver_cpus}
    )
    tuner = tune.Tuner(
        trainable,
        param_space={"number": tune.grid_search(list(range(TRIALS)))},
        tune_config=tune.TuneConfig(
            search_alg=tune.search.BasicVariantGenerator(max_concurrent=fits), reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(storage),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=3),
        ),
    )
    results = fit_with_retries(
        tuner,
        lambda: tune.Tuner.restore(
            str(storage / "trials"), trainable, resume_unfinished=True, resume_errored=True
        ),
    )
    records = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    edges = sorted([(r["began"], 1) for r in records] + [(r["ended"], -1) for r in records])
    at_once = peak = 0
    for _, change in edges:
        at_once += change
        peak = max(peak, at_once)
    busiest = 0
    for moment in (r["began"] for r in records):
        held = Counter(n for r in records if r["began"] <= moment < r["ended"] for n in r["nodes"])
        busiest = max(busiest, *held.values())
    found = {
        "trials_at_once": fits,
        "finished": sum(result.error is None for result in results),
        "errors": len(results.errors),
        "peak": peak,
        "busiest_machine": busiest,
        "machines_used": len({node for r in records for node in r["nodes"]}),
        "lost_a_machine": bool(lost),
        "after_the_loss": sum(bool(lost) and r["began"] > lost[0] for r in records),
        "longest_wait": round(max(r["waited"] for r in records), 1),
        "seconds": round(time.time() - began, 1),
    }
    ray.shutdown()
    cluster.shutdown()
    return found


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(sys.argv[1])))
