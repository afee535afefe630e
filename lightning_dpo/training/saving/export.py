"""From training to a model that stands alone: a plain Hugging Face folder of a policy or a checkpoint."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_dpo.files import scratch_folder
from lightning_dpo.models.classifier import as_classifier, separate_padding
from lightning_dpo.models.load import load_tokenizer
from lightning_dpo.models.unwrap import causal_lm
from lightning_dpo.training.saving.read import read_checkpoint

__all__ = ["check_export_folder", "export_checkpoint", "export_model"]

_log = logging.getLogger(__name__)


def export_model(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    merge: bool = True,
    reward_head: Tensor | None = None,
) -> Path:
    """Write a model as a plain Hugging Face folder.

    Args:
        model: A Hugging Face model, possibly with an adapter.
        folder: Where to; must be missing or empty. It appears complete or not at all.
        tokenizer: A tokenizer, or a source to load one from; None or a module leaves it out.
        merge: Fold an adapter into the weights; False writes the adapter alone.
        reward_head: Makes the folder one for `AutoModelForSequenceClassification`, see `as_classifier`; None
            keeps the model's own head.

    Raises:
        ValueError: If the model is not a Hugging Face model, or the folder holds something.
    """
    target = check_export_folder(folder)
    if not isinstance(causal_lm(model), PreTrainedModel):
        raise ValueError(
            f"export writes Hugging Face models, got {type(model).__name__}; save its state_dict yourself"
        )
    if reward_head is not None and hasattr(model, "merge_and_unload") and not merge:
        raise ValueError("`merge=False` writes an adapter alone, without the reward's head; use merge=True")
    plain: Any = model
    if merge and hasattr(plain, "merge_and_unload"):
        plain = copy.deepcopy(plain).merge_and_unload()
    if isinstance(tokenizer, str):
        tokenizer = _tokenizer_or_none(tokenizer)
    if reward_head is not None:
        plain, tokenizer = as_classifier(plain, reward_head), copy.deepcopy(tokenizer)
        separate_padding(plain, tokenizer)
    with scratch_folder(target) as scratch:
        plain.save_pretrained(scratch)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer.save_pretrained(scratch)
    return target


def check_export_folder(folder: str | Path) -> Path:
    """The folder of a model that is to be written.

    Raises:
        ValueError: If it holds something.
    """
    target = Path(folder).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"the export folder must be missing or empty, got {str(folder)!r}")
    return target


def export_checkpoint(checkpoint: str | Path, output: str | Path, *, merge: bool = True) -> Path:
    """Turn a training checkpoint into a Hugging Face folder with weights and tokenizer.

    Args:
        checkpoint: A file that the trainer saved while training a `PolicyModule`, or a folder that it saved
            under FSDP2, each rank its part.
        output: The folder to write; must be missing or empty.
        merge: Fold an adapter into the base weights; False writes the adapter alone.

    Returns:
        The folder.

    Raises:
        ValueError: If it is missing or was not saved by a module of this package.
    """
    saved = read_checkpoint(checkpoint)
    source = saved.record.source
    if source is None:
        _log.warning("the policy was given as an object: its tokenizer is not known, so none is exported")
    return export_model(saved.build(), output, tokenizer=source, merge=merge, reward_head=saved.reward_head)


def _tokenizer_or_none(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model source; weights are worth exporting without one."""
    try:
        return load_tokenizer(source)
    except ValueError as error:
        _log.warning("exported without a tokenizer: %s", str(error).splitlines()[0])
        return None
