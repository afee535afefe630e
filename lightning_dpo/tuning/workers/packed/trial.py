"""What Tune runs for a packed trial: it passes on what the process says that trains it.

Nothing heavy is imported here: there is a process of this kind for each trial, and it is to stay small.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ray
from ray import tune

from lightning_dpo.tuning.workers.mailbox import Event

__all__ = ["run_packed_trial"]


def run_packed_trial(config: Mapping[str, Any], *, spec: bytes, packs: Any) -> None:
    """Have one trial trained beside others.

    Args:
        config: What the searcher chose.
        spec: What the sweep's trials have in common, pickled.
        packs: Ray's handle of the account of processes.

    Raises:
        RuntimeError: If the trial fails in a way that another start may mend.
        RayActorError: If the process that trains it dies.
    """
    trial = tune.get_context().get_trial_id()
    node = ray.get_runtime_context().get_node_id()
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "") if ray.get_gpu_ids() else None
    host = ray.get(packs.join.remote(trial, node, gpu))
    try:
        ray.get(host.begin.remote(trial, dict(config), spec, tune.get_checkpoint()))
        while (event := _next_event(host, trial)).kind == "report":
            tune.report(dict(event.metrics), checkpoint=event.checkpoint)
            ray.get(host.answer.remote(trial))
    except SystemExit:
        # A scheduler has stopped the trial, and this process is wanted for another one.
        host.stop.remote(trial)
        raise
    finally:
        packs.leave.remote(trial)
    if event.kind == "failed":
        raise RuntimeError(event.error)


def _next_event(host: Any, trial: str) -> Event:
    while True:
        event: Event | None = ray.get(host.next_event.remote(trial))
        if event is not None:
            return event
