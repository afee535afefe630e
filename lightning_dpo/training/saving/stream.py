"""From a checkpoint folder to a Hugging Face folder, a file of weights at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

__all__ = ["NotInPartsError", "check_size", "write_in_parts"]

_PATTERN = "model{suffix}.safetensors"


class NotInPartsError(Exception):
    """A model's files hold tensors that are made of several of its weights at once."""


def check_size(max_shard_size: int | str) -> None:
    """Refuse what is no size.

    Raises:
        ValueError: If it is neither a number of bytes nor such as "5GB".
    """
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ValueError(
            f'`max_shard_size` must be a number of bytes, or such as "5GB" or "500MB", got {max_shard_size!r}'
        ) from error


def write_in_parts(
    model: PreTrainedModel,
    folder: Path,
    *,
    read: Callable[[Iterable[str]], dict[str, Tensor]],
    max_shard_size: int | str,
) -> None:
    """Write what `model.save_pretrained` would, reading weights as they are written.

    In memory at once are the tensors of one file, and one weight as it was saved.

    Args:
        model: Made on the meta device, in the type that weights are written in.
        folder: An empty one.
        read: Gives weights by their names in the model's state.
        max_shard_size: Most bytes of one file, unless a single tensor has more.

    Raises:
        NotInPartsError: If that cannot be done, before anything is written.
    """
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in (model._keys_to_ignore_on_save or ())
    }
    kept = remove_tied_weights_from_state_dict(state, model)
    sources = _sources(model, kept)
    written = revert_weight_conversion(model, dict(kept))
    if {name: tensor.shape for name, (_, tensor) in sources.items()} != {
        name: tensor.shape for name, tensor in written.items()
    }:
        raise NotInPartsError(type(model).__name__)
    split = split_torch_state_dict_into_shards(
        written, filename_pattern=_PATTERN, max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        tensors: dict[str, Tensor] = {}
        for source in dict.fromkeys(sources[name][0] for name in names):
            weight = read([source])[source].to(kept[source].dtype)
            parts = revert_weight_conversion(model, {source: weight})
            tensors.update((name, _alone(part)) for name, part in parts.items() if name in names)
            del weight, parts
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        content = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(content, encoding="utf-8")
    _write_configuration(model, folder)


def _sources(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Which weight each tensor of the files comes from, where weights are taken one by one."""
    found: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        try:
            parts: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
        except Exception as error:  # some conversions need weights together, and fail in ways of their own
            raise NotInPartsError(type(model).__name__) from error
        found.update((written, (name, part)) for written, part in parts.items())
    return found


def _alone(tensor: Tensor) -> Tensor:
    """A tensor that keeps no more memory than its own."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)


def _write_configuration(model: Any, folder: Path) -> None:
    """What `save_pretrained` writes besides weights."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
