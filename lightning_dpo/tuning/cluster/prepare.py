"""What is done once for all trials: the reference's log-probabilities, and the tokenised data with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from lightning_dpo.reference.spec import ReferenceSpec
from lightning_dpo.tuning.cluster.connect import node_resources
from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.objective import check_goals
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.fit import TrialPlan, fit_once, tokenise
from lightning_dpo.tuning.workers.group import placement
from lightning_dpo.tuning.workers.run import run_once

__all__ = ["Preparation", "filling_group", "prepare"]


_NO_TRAINING = {"max_epochs": 0, "max_steps": -1}
_PLACEMENT_SECONDS = 10.0
"""That a group for the reference's pass may wait for its place; else it is a trial's size."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """What trials find ready.

    Attributes:
        overrides: Laid over every trial's values.
        reference_passes: Passes of the reference over the data: 1 if it is shared.
        metrics: Names that a validation logs, where that was tried out.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    reference_passes: int = 0
    metrics: tuple[str, ...] = ()


def prepare(plan: TrialPlan, config: SweepConfig) -> Preparation:
    """Fill the cache of the reference; for a module of one's own, find out what it logs.

    Args:
        plan: What trials will run.
        config: The sweep.

    Raises:
        ValueError: If the reference or the data cannot be used, or the objective is not logged.
    """
    if not plan.recipe.is_preference:
        metrics = _on_cluster(plan, fit_once, {"fast_dev_run": True})
        check_goals(plan.objective, metrics=metrics, varied=())
        return Preparation(metrics=metrics)
    data, reference = _shared_data(plan), _shared_reference(plan, config)
    ready = replace(plan, prepared={**plan.prepared, **data, **reference})
    if data:
        # In one process: with several, each machine's first one would do it.
        _on_cluster(ready, tokenise)
    if not reference:
        return Preparation(ready.prepared)
    # No epoch is run: starting to fit is what tokenises the data and fills the cache.
    group = filling_group(ready, node_resources())
    if group is not None and group.workers > ready.workers and not _has_room(group):
        group = ready if ready.workers > 1 else None
    if group is not None:
        run_once(group, _NO_TRAINING)
    else:
        _on_cluster(ready, fit_once, _NO_TRAINING)
    return Preparation(ready.prepared, reference_passes=1)


def filling_group(plan: TrialPlan, nodes: Sequence[Mapping[str, float]]) -> TrialPlan | None:
    """A plan of as many workers for the reference's pass as a cluster holds, whatever a trial has.

    One on each GPU, or on each machine where there are none; None for one worker, which needs no group.

    Args:
        plan: Of trials.
        nodes: Resources of each machine.
    """
    gpus = max(plan.gpus, 1.0) if plan.gpus else 0.0
    workers = 0
    for node in nodes:
        held = math.floor(node.get("CPU", 0.0) / plan.cpus + 1e-9)
        workers += min(held, math.floor(node.get("GPU", 0.0) / gpus + 1e-9) if gpus else 1)
    if workers <= plan.workers:
        return plan if plan.workers > 1 else None
    return replace(plan, workers=workers, gpus=gpus)


def _has_room(plan: TrialPlan) -> bool:
    """Whether all these workers can run now: others may be at work on the cluster too."""
    bundle = {"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})}
    group = placement_group([bundle] * plan.workers, strategy=placement(plan))
    try:
        return bool(group.wait(_PLACEMENT_SECONDS))
    finally:
        remove_placement_group(group)


def _shared_data(plan: TrialPlan) -> dict[str, Any]:
    """Overrides that make all machines read one copy of the tokenised data, where they share a folder."""
    parsed = plan.recipe.cli({}, parse_only=True).config
    storage = Storage(plan.location)
    if len(node_resources()) < 2 or not storage.is_local or parsed.get("data.cache_dir", "") is not None:
        return {}
    return {"data.cache_dir": (storage / "data").location}


def _shared_reference(plan: TrialPlan, config: SweepConfig) -> dict[str, Any]:
    """Overrides that make trials read the reference from a cache; none where they cannot."""
    if not config.share_reference:
        return {}
    parsed = plan.recipe.cli({}, parse_only=True).config
    reference = parsed.get("model.reference")
    if not isinstance(reference, str) or reference == "none":
        return {}
    cache = config.reference_cache or parsed.get("model.reference_cache")
    return {
        "model.reference": str(ReferenceSpec.parse(reference).cached()),
        "model.reference_cache": cache or (Storage(plan.location) / "reference").location,
    }


def _on_cluster(plan: TrialPlan, function: Any, *arguments: Any) -> Any:
    """Run a piece of a trial on a machine like those of trials; returns what the function does."""
    task = ray.remote(num_cpus=plan.cpus, num_gpus=plan.gpus, max_retries=1)(function)
    try:
        return ray.get(task.remote(plan, *arguments))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(f"the recipe does not run: {error.cause}") from error
        raise
