"""The prompts that a frontier's policies complete: different ones of the validation data."""

from __future__ import annotations

from typing import Any

import torch

from lightning_dpo.tuning.trial.fit import local_trainer_options
from lightning_dpo.tuning.trial.outcomes import drawn_prompts
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["validation_prompts"]


def validation_prompts(spec: TrialSpec, count: int) -> tuple[tuple[tuple[int, ...], ...], Any]:
    """Read the recipe's validation data; runs on a machine of the cluster.

    Args:
        spec: Holds the recipe.
        count: How many different prompts to take at most.

    Returns:
        Token ids of each prompt, the first ones in the order of the data, and the tokenizer. Where batches
        are filled by length, so that the first are the shortest, they are drawn by their keys instead.

    Raises:
        ValueError: If there is no validation data, or its batches have no prompts.
    """
    with spec.user_environment():
        options = {"logger": False, "enable_checkpointing": False, **local_trainer_options(spec.resources)}
        cli = spec.recipe.instantiate({}, trainer_options=options)
        data = cli.datamodule
        data.trainer = cli.trainer
        data.prepare_data()
        data.setup("fit")
        is_by_length = getattr(data, "tokens_per_batch", None) is not None
        found: dict[tuple[int, ...], None] = {}
        for batch in data.val_dataloader():
            if not hasattr(batch, "prompt_ids"):
                raise ValueError(
                    f"`data` must give batches with prompts, such as PairBatch, got {type(batch).__name__}"
                )
            for prompt in torch.split(batch.prompt_ids, batch.prompt_lengths.tolist()):
                found[tuple(prompt.tolist())] = None
            if len(found) >= count and not is_by_length:
                break
        if not found:
            raise ValueError("`data.validation` or `data.validation_split` must give prompts to complete")
        prompts = list(found)
        if is_by_length:
            prompts = [tuple(prompt) for prompt in drawn_prompts(prompts, count)]
        return tuple(prompts[:count]), data.tokenizer
