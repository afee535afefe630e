"""The cluster: joining or starting it, and how many trials it holds at once."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray

from lightning_dpo.tuning.cluster.resources import Resources

__all__ = ["connected", "is_this_machine_alone", "node_resources", "trials_at_once"]

_VARIABLES = {
    "s3": ("AWS_", "FSSPEC_S3_"),
    "gs": ("GOOGLE_", "FSSPEC_GS_", "STORAGE_EMULATOR_HOST"),
    "gcs": ("GOOGLE_", "FSSPEC_GCS_", "STORAGE_EMULATOR_HOST"),
    "az": ("AZURE_", "FSSPEC_AZ_"),
    "abfs": ("AZURE_", "FSSPEC_ABFS_"),
    "hf": ("HF_",),
}
"""Beginnings of the environment variables that hold an object store's address and credentials."""


@contextlib.contextmanager
def connected(address: str | None, *, urls: Iterable[str | None] = ()) -> Iterator[None]:
    """Join a cluster, or start one on this machine for as long as the block lasts.

    A connection that is already there is used and left as it was.

    Args:
        address: The cluster's address; None takes the one that Ray finds on this machine, or starts one.
        urls: Object stores that trials use; they get the variables of this process that their clients read.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the sweep has a table of its own
    environment = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "60", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    for name in ("LIGHTNING_DPO_CACHE", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        if name in os.environ:
            environment[name] = os.environ[name]
    prefixes = [prefix for url in urls for prefix in _VARIABLES.get(str(url).partition("://")[0], ())]
    if prefixes:
        environment |= {k: v for k, v in os.environ.items() if k.startswith(tuple(prefixes))}
    options: dict[str, Any] = {"include_dashboard": False} if address is None else {"address": address}
    ray.init(
        **options,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": environment},
    )
    try:
        yield
    finally:
        ray.shutdown()


def node_resources() -> list[dict[str, float]]:
    """CPUs and GPUs of each living machine."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [dict(node["Resources"]) for node in nodes if node["Alive"]]


def is_this_machine_alone() -> bool:
    """Whether the cluster is the machine of this process, and no other."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    living = [node["NodeID"] for node in nodes if node["Alive"]]
    return living == [ray.get_runtime_context().get_node_id()]


def trials_at_once(nodes: Sequence[dict[str, float]], resources: Resources) -> int:
    """How many trials a cluster holds, each with all its workers.

    A worker lies on one machine; the workers of a trial may lie on several. Tune itself counts only the
    process that drives a trial: more trials than this would wait for each other's workers.

    Args:
        nodes: CPUs and GPUs of each machine, as Ray names them.
        resources: What a trial takes of the cluster.

    Raises:
        ValueError: If not one trial fits.
    """

    def fitting(drivers: int) -> int:
        """Trials whose workers fit, if all these drivers lie on one machine, whichever it is."""
        taken = drivers * resources.driver_cpus
        return sum(_workers_on(node, resources, taken=taken) for node in nodes) // resources.workers

    trials = fitting(0)
    while trials and fitting(trials) < trials:
        trials -= 1
    if trials < 1:
        held = ", ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise ValueError(
            f"`workers`, `cpus` and `gpus` must fit the cluster: a trial needs {resources.workers} x "
            f"({resources.cpus:g} CPUs, {resources.gpus:g} GPUs) and {resources.driver_cpus:g} CPUs beside "
            f"them, got machines with {held}"
        )
    return trials


def _workers_on(node: dict[str, float], resources: Resources, *, taken: float) -> int:
    """Workers that a machine holds, if some of its CPUs are taken."""
    gpus = resources.gpus
    found = max(math.floor((node.get("CPU", 0.0) - taken) / resources.cpus + 1e-9), 0)
    if gpus >= 1:
        found = min(found, math.floor(node.get("GPU", 0.0) / gpus + 1e-9))
    elif gpus > 0:
        # A share of a GPU is never taken from two of them.
        found = min(found, math.floor(node.get("GPU", 0.0)) * math.floor(1 / gpus + 1e-9))
    return found
