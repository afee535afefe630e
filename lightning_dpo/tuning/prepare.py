"""What is done once for all trials: the reference's log-probabilities, and the tokenised data with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from lightning_dpo.precompute import cached_form
from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.fitting import TrialPlan, fit_once
from lightning_dpo.tuning.objective import check_goals
from lightning_dpo.tuning.storage import Storage

__all__ = ["Preparation", "prepare"]


_NO_TRAINING = {"max_epochs": 0, "max_steps": -1}


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
        metrics = _on_cluster(plan, {"fast_dev_run": True})
        check_goals(plan.objective, metrics=metrics, varied=())
        return Preparation(metrics=metrics)
    shared = _shared_reference(plan, config)
    if not shared:
        return Preparation(plan.prepared)
    # No epoch is run: starting to fit is what tokenises the data and fills the cache.
    overrides = {**plan.prepared, **shared}
    ready = replace(plan, prepared=overrides)
    if plan.workers > 1:
        from lightning_dpo.tuning.workers import run_once

        run_once(ready, _NO_TRAINING)
    else:
        _on_cluster(ready, _NO_TRAINING)
    return Preparation(overrides, reference_passes=1)


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
        "model.reference": cached_form(reference),
        "model.reference_cache": cache or (Storage(plan.location) / "reference").location,
    }


def _on_cluster(plan: TrialPlan, trainer_options: dict[str, Any]) -> tuple[str, ...]:
    """Run a piece of a trial on a machine like those of trials; returns the names that were logged."""
    task = ray.remote(num_cpus=plan.cpus, num_gpus=plan.gpus, max_retries=1)(fit_once)
    try:
        names: tuple[str, ...] = ray.get(task.remote(plan, trainer_options))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(f"the recipe does not run: {error.cause}") from error
        raise
    return names
