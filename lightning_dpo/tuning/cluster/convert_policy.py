"""A policy that comes as GGUF is dequantised once for a sweep, not once in every trial."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from lightning_dpo.models.load import load_model, load_tokenizer
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.fit import TrialPlan, users_place

__all__ = ["convert_policy"]

_FOLDER = "policy"


def convert_policy(plan: TrialPlan) -> TrialPlan:
    """Write the policy and its tokenizer beside the trials where they come as GGUF, which is slow to read.

    The best trial's recipe still names what the user named.

    Args:
        plan: What trials will run.

    Returns:
        The plan with values that point trials there; the same one where there is nothing to gain.

    Raises:
        ValueError: If the policy cannot be loaded.
    """
    storage = Storage(plan.location)
    if not storage.is_local or any(path.startswith("model.policy") for path in plan.space.paths):
        return plan
    parsed = plan.recipe.cli({}, parse_only=True).config
    source = parsed.get("model.policy")
    if not isinstance(source, str) or not source.endswith(".gguf"):
        return plan
    # Where trials run, for the file is there.
    task = ray.remote(num_cpus=plan.cpus, max_retries=1)(_convert)
    ray.get(task.remote(plan, source, Path(storage.location) / _FOLDER))
    values: dict[str, Any] = {"model.policy": (storage / _FOLDER).location}
    if parsed.get("data.tokenizer") is None:
        values["data.tokenizer"] = values["model.policy"]
    return replace(plan, prepared={**plan.prepared, **values})


def _convert(plan: TrialPlan, source: str, target: Path) -> None:
    if (target / "config.json").is_file():
        return  # by the sweep that this one goes on with
    scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with users_place(plan):
        load_model(source).save_pretrained(scratch)
        load_tokenizer(source).save_pretrained(scratch)
    scratch.replace(target)
