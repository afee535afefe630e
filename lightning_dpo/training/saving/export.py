"""From training to a model that stands alone: a plain Hugging Face folder of a policy or a checkpoint."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_dpo.files import scratch_folder
from lightning_dpo.models.classifier import as_classifier, separate_padding
from lightning_dpo.models.load import load_tokenizer
from lightning_dpo.models.unwrap import causal_lm
from lightning_dpo.parallel import full_state, on_rank_zero
from lightning_dpo.parallel.checkpoint_reader import FolderReader
from lightning_dpo.training.saving.model_record import POLICY_PREFIX, ModelRecord, rebuild, untrained
from lightning_dpo.training.saving.read import read_checkpoint, record_of
from lightning_dpo.training.saving.stream import NotInPartsError, check_size, write_in_parts

__all__ = ["check_export_folder", "export_checkpoint", "export_model", "export_sharded"]

_log = logging.getLogger(__name__)


def export_model(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    merge: bool = True,
    reward_head: Tensor | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a model as a plain Hugging Face folder.

    Args:
        model: A Hugging Face model, possibly with an adapter.
        folder: Where to; must be missing or empty. It appears complete or not at all.
        tokenizer: A tokenizer, or a source to load one from; None or a module leaves it out.
        merge: Fold an adapter into the weights; False writes the adapter alone.
        reward_head: Makes the folder one for `AutoModelForSequenceClassification`, see `as_classifier`; None
            keeps the model's own head.
        max_shard_size: Most bytes of one file of weights: a number, or such as "5GB"; None is transformers'
            own.

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
    limited = max_shard_size is not None and isinstance(plain, PreTrainedModel)
    size = {"max_shard_size": max_shard_size} if limited else {}
    with scratch_folder(target) as scratch:
        plain.save_pretrained(scratch, **size)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer.save_pretrained(scratch)
    return target


def export_sharded(
    model: nn.Module, folder: str | Path, *, record: ModelRecord, strategy: Any, **options: Any
) -> Path:
    """Gather a model's weights on rank 0, which writes them; every rank must call this.

    Args:
        model: One that is split over ranks.
        folder: As for `export_model`.
        record: What rebuilds the model.
        strategy: The trainer's.
        options: For `export_model`.
    """
    weights = full_state(model)
    return on_rank_zero(strategy, lambda: export_model(rebuild(record, weights), folder, **options))


def check_export_folder(folder: str | Path) -> Path:
    """The folder of a model that is to be written.

    Raises:
        ValueError: If it holds something.
    """
    target = Path(folder).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"the export folder must be missing or empty, got {str(folder)!r}")
    return target


def export_checkpoint(
    checkpoint: str | Path, output: str | Path, *, merge: bool = True, max_shard_size: int | str = "5GB"
) -> Path:
    """Turn a training checkpoint into a Hugging Face folder with weights and tokenizer.

    All weights of a folder that ranks wrote in parts are copied a file at a time, without a host that holds
    the model; adapters and reward models are made whole in memory.

    Args:
        checkpoint: A file that the trainer saved while training a `PolicyModule`, or a folder that it saved
            under FSDP2, each rank its part.
        output: The folder to write; must be missing or empty.
        merge: Fold an adapter into the base weights; False writes the adapter alone.
        max_shard_size: Most bytes of one file of weights, and of what is in memory at once besides the
            largest single weight: a number, or such as "5GB".

    Returns:
        The folder.

    Raises:
        ValueError: If it is missing or was not saved by a module of this package.
    """
    check_size(max_shard_size)
    target, path = check_export_folder(output), Path(checkpoint)
    if path.is_dir():
        try:
            if _export_in_parts(FolderReader(path), path, target, max_shard_size=max_shard_size):
                return target
        except NotInPartsError as error:
            _log.warning("%s cannot be written in parts: it is made whole in memory", error)
    saved = read_checkpoint(path)
    return export_model(
        saved.build(),
        output,
        tokenizer=_tokenizer_source(saved.record),
        merge=merge,
        reward_head=saved.reward_head,
        max_shard_size=max_shard_size,
    )


def _export_in_parts(reader: FolderReader, path: Path, target: Path, *, max_shard_size: int | str) -> bool:
    """Export a folder that holds all weights of a language model; whether it is one."""
    record = record_of(reader.content, path)
    if record.config is None or record.lora is not None or record.reward_head is not None:
        return False
    names = [name for name in reader.empty if name.startswith(POLICY_PREFIX)]
    with torch.device("meta"):
        model = untrained(record, dtype=reader.empty[names[0]].dtype)
    differing = {name.removeprefix(POLICY_PREFIX) for name in names} ^ model.state_dict().keys()
    if differing:
        raise ValueError(f"the checkpoint's weights are not those of its model: {sorted(differing)[:3]}")

    def read(wanted: Iterable[str]) -> dict[str, Tensor]:
        state = reader.read(POLICY_PREFIX + name for name in wanted)
        return {name.removeprefix(POLICY_PREFIX): tensor for name, tensor in state.items()}

    source = _tokenizer_source(record)
    tokenizer = None if source is None else _tokenizer_or_none(source)
    with scratch_folder(target) as scratch:
        write_in_parts(model, scratch, read=read, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
    return True


def _tokenizer_source(record: ModelRecord) -> str | None:
    if record.source is None:
        _log.warning("the policy was given as an object: its tokenizer is not known, so none is exported")
    return record.source


def _tokenizer_or_none(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model source; weights are worth exporting without one."""
    try:
        return load_tokenizer(source)
    except ValueError as error:
        _log.warning("exported without a tokenizer: %s", str(error).splitlines()[0])
        return None
