"""What is done once for all trials: the reference's log-probabilities, and the tokenised data with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group

from lightning_dpo.data.datamodule import TokenDataModule
from lightning_dpo.evaluation.judges import ModelJudge
from lightning_dpo.reference.spec import ReferenceSpec
from lightning_dpo.tuning.cluster.connect import node_resources
from lightning_dpo.tuning.cluster.convert_policy import convert_policy
from lightning_dpo.tuning.cluster.resources import Resources
from lightning_dpo.tuning.cluster.task import run_as_task, run_preparation
from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.objective import check_goals
from lightning_dpo.tuning.recipe.command_line import ParsedRecipe
from lightning_dpo.tuning.recipe.judge import make_judge
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.fit import fit_recipe, tokenise
from lightning_dpo.tuning.trial.kl import load_judge_model
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.workers.group import cluster_placement
from lightning_dpo.tuning.workers.single_run import run_on_workers

__all__ = ["Preparation", "prepare", "reference_pass_resources"]


_NO_TRAINING = {"max_epochs": 0, "max_steps": -1}
_PLACEMENT_SECONDS = 10.0
"""That a group for the reference's pass may wait for its place; else it is a trial's size."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """What trials find ready.

    Attributes:
        overrides: Laid over every trial's values.
        reference_passes: Passes of the reference over the data: 1 if it is shared.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    reference_passes: int = 0


def prepare(spec: TrialSpec, config: SweepConfig) -> Preparation:
    """Do what the module's class lets trials share; try out what it logs where the class does not say.

    Args:
        spec: What the sweep's trials have in common.
        config: The sweep.

    Raises:
        ValueError: If policy, reference, data or judge cannot be used, or the objective is not logged.
    """
    traits = spec.recipe.traits
    if spec.judge is not None and isinstance(make_judge(spec.judge), ModelJudge):
        run_preparation(spec, load_judge_model)
    if traits.logged_metrics is None:
        check_goals(spec.objective, metrics=run_as_task(spec, fit_recipe, {"fast_dev_run": True}))
    if not traits.exports and not traits.shares_reference:
        return Preparation()
    recipe = spec.recipe.parse()
    overrides = dict(convert_policy(spec, recipe)) if traits.exports else {}
    if not traits.shares_reference:
        return Preparation(overrides)
    data = _shared_data(spec, recipe)
    reference = _shared_reference(spec, config, recipe)
    spec = replace(spec, prepared={**overrides, **data, **reference})
    if data:
        # In one process: with several, each machine's first one would do it.
        run_preparation(spec, tokenise)
    if reference:
        _fill_reference_cache(spec)
    return Preparation(spec.prepared, reference_passes=int(bool(reference)))


def reference_pass_resources(resources: Resources, nodes: Sequence[Mapping[str, float]]) -> Resources | None:
    """As many workers for the reference's pass as a cluster holds, whatever a trial has.

    One on each GPU, or on each machine where there are none; None for one worker, which needs no group.

    Args:
        resources: What a trial takes of the cluster.
        nodes: CPUs and GPUs of each machine, as Ray names them.
    """
    gpus = max(resources.gpus, 1.0) if resources.gpus else 0.0
    workers = 0
    for node in nodes:
        held = math.floor(node.get("CPU", 0.0) / resources.cpus + 1e-9)
        workers += min(held, math.floor(node.get("GPU", 0.0) / gpus + 1e-9) if gpus else 1)
    if workers <= resources.workers:
        return resources if resources.workers > 1 else None
    return replace(resources, workers=workers, gpus=gpus)


def _fill_reference_cache(spec: TrialSpec) -> None:
    """Start to fit, and run no epoch: that tokenises the data and fills the cache."""
    own = spec.resources
    group = reference_pass_resources(own, node_resources())
    if group is not None and group.workers > own.workers and not _has_room(group):
        group = own if own.workers > 1 else None
    if group is None:
        run_preparation(spec, fit_recipe, _NO_TRAINING)
    else:
        run_on_workers(replace(spec, resources=group), _NO_TRAINING)


def _has_room(resources: Resources) -> bool:
    """Whether all these workers can run now: others may be at work on the cluster too."""
    group = placement_group([resources.per_worker] * resources.workers, strategy=cluster_placement(resources))
    try:
        return bool(group.wait(_PLACEMENT_SECONDS))
    finally:
        remove_placement_group(group)


def _shared_data(spec: TrialSpec, recipe: ParsedRecipe) -> dict[str, Any]:
    """Overrides that make all machines read one copy of the tokenised data, or fetch it from a URL."""
    storage = Storage(spec.location)
    if len(node_resources()) < 2 or recipe.get("data.cache_dir", "") is not None:
        return {}
    if not storage.is_local and not issubclass(recipe.data_class, TokenDataModule):
        return {}  # what another class does with a URL is not known
    return {"data.cache_dir": (storage / "data").location}


def _shared_reference(spec: TrialSpec, config: SweepConfig, recipe: ParsedRecipe) -> dict[str, Any]:
    """Overrides that make trials read the reference from a cache; none where they cannot."""
    reference = recipe.get("model.reference")
    if not config.share_reference or not isinstance(reference, str) or reference == "none":
        return {}
    cache = config.reference_cache or recipe.get("model.reference_cache")
    return {
        "model.reference": str(ReferenceSpec.parse(reference).cached()),
        "model.reference_cache": cache or (Storage(spec.location) / "reference").location,
    }
