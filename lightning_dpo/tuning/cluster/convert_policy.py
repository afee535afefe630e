"""A policy that comes as GGUF is dequantised once for a sweep, not once in every trial."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_dpo.files import scratch_folder
from lightning_dpo.models.load import load_model, load_tokenizer
from lightning_dpo.tuning.cluster.task import run_preparation
from lightning_dpo.tuning.recipe.command_line import ParsedRecipe
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["convert_policy"]


def convert_policy(spec: TrialSpec, recipe: ParsedRecipe) -> Mapping[str, Any]:
    """Write the policy and its tokenizer beside the trials where they come as GGUF, which is slow to read.

    The best trial's recipe still names what the user named.

    Args:
        spec: What the sweep's trials have in common.
        recipe: What they have in common, parsed.

    Returns:
        Overrides that point trials to what was written; none where there is nothing to gain.

    Raises:
        ValueError: If the policy cannot be loaded.
    """
    storage = Storage(spec.location)
    source = recipe.get("model.policy")
    is_varied = any(path.startswith("model.policy") for path in spec.space.paths)
    if not storage.is_local or is_varied or not isinstance(source, str) or not source.endswith(".gguf"):
        return {}
    target = storage / "policy"
    # Where trials run, for the file is there.
    run_preparation(spec, _convert, source, Path(target.location))
    return {"model.policy": target.location}


def _convert(spec: TrialSpec, source: str, target: Path) -> None:
    if (target / "config.json").is_file():
        return  # by the sweep that this one goes on with
    with spec.user_environment(), scratch_folder(target) as scratch:
        load_model(source).save_pretrained(scratch)
        load_tokenizer(source).save_pretrained(scratch)
