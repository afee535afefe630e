"""From training to a model that stands alone: what a checkpoint records, and the folder it is exported to."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lightning_dpo.models.load import load_model, load_tokenizer
from lightning_dpo.models.lora import LoraSettings, apply_lora
from lightning_dpo.scoring.forward import causal_lm

if TYPE_CHECKING:
    from lightning_dpo.models.build import PolicySettings

__all__ = [
    "RECORD_KEY",
    "ModelRecord",
    "adapter_state",
    "drop_base_weights",
    "drop_moving_reference",
    "export_checkpoint",
    "export_model",
    "plain_hyperparameters",
    "rebuild",
]

_log = logging.getLogger(__name__)

RECORD_KEY = "lightning_dpo"
"""Where in a checkpoint the `ModelRecord` stands."""

_PREFIX = "policy."


class ModelRecord(NamedTuple):
    """What a checkpoint says about its model, besides weights; plain types only.

    Attributes:
        source: Where the policy and its tokenizer came from; None for a policy given as an object.
        config: The model's Hugging Face config as JSON; None for a user's own module.
        lora: The adapter's settings, or None.
    """

    source: str | None
    config: str | None
    lora: dict[str, Any] | None

    @classmethod
    def of(cls, policy: nn.Module, settings: PolicySettings) -> ModelRecord:
        """Describe a policy."""
        lm: Any = causal_lm(policy)
        return cls(
            source=settings.policy if isinstance(settings.policy, str) else None,
            config=json.dumps(lm.config.to_dict()) if isinstance(lm, PreTrainedModel) else None,
            lora=None if settings.lora is None else dict(vars(settings.lora)),
        )

    def to_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return self._asdict()


def adapter_state(state: dict[str, Any]) -> dict[str, Any]:
    """The part of a module's state that is not the frozen base model."""
    return {key: value for key, value in state.items() if not key.startswith(_PREFIX) or "lora_" in key}


def drop_base_weights(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A state-dict hook: leave `adapter_state`."""
    kept = adapter_state(state)
    for key in [key for key in state if key not in kept]:
        del state[key]


def drop_moving_reference(checkpoint: dict[str, Any]) -> None:
    """Leave out the weights of a reference that moved, for a module whose reference does not."""
    state = checkpoint.get("state_dict", {})
    for key in [key for key in state if key.startswith("moving_reference.")]:
        del state[key]


def plain_hyperparameters(
    settings: PolicySettings, reference: str | nn.Module, reference_cache: str | None
) -> dict[str, Any]:
    """Arguments that `load_from_checkpoint` can pass again: no modules, no callables."""
    candidates = {"policy": settings.policy, "reference": reference, "reference_cache": reference_cache}
    return {name: value for name, value in candidates.items() if isinstance(value, str)}


def export_model(model: nn.Module, folder: str | Path, *, tokenizer: Any = None, merge: bool = True) -> Path:
    """Write a model as a plain Hugging Face folder.

    Args:
        model: A Hugging Face model, possibly with an adapter.
        folder: Where to; must be missing or empty. It appears complete or not at all.
        tokenizer: A tokenizer, or a source to load one from; None or a module leaves it out.
        merge: Fold an adapter into the weights; False writes the adapter alone.

    Raises:
        ValueError: If the model is not a Hugging Face model, or the folder holds something.
    """
    target = Path(folder).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"the export folder must be missing or empty, got {str(folder)!r}")
    if not isinstance(causal_lm(model), PreTrainedModel):
        raise ValueError(
            f"export writes Hugging Face models, got {type(model).__name__}; save its state_dict yourself"
        )
    plain: Any = model
    if merge and hasattr(plain, "merge_and_unload"):
        plain = copy.deepcopy(plain).merge_and_unload()
    if isinstance(tokenizer, str):
        tokenizer = _tokenizer_or_none(tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        plain.save_pretrained(scratch)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer.save_pretrained(scratch)
        scratch.chmod(0o777 & ~_umask())
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return target


def export_checkpoint(checkpoint: str | Path, output: str | Path, *, merge: bool = True) -> Path:
    """Turn a training checkpoint into a Hugging Face folder with weights and tokenizer.

    Args:
        checkpoint: A file that the trainer saved while training DPOModule, or a folder that it saved under
            FSDP2, each rank its part.
        output: The folder to write; must be missing or empty.
        merge: Fold an adapter into the base weights; False writes the adapter alone.

    Returns:
        The folder.

    Raises:
        ValueError: If it is missing or was not saved by DPOModule.
    """
    content = _read(Path(checkpoint))
    if RECORD_KEY not in content:
        raise ValueError(f"`checkpoint` must have been saved by DPOModule, got {str(checkpoint)!r}")
    record = ModelRecord(**content[RECORD_KEY])
    weights = {k.removeprefix(_PREFIX): v for k, v in content["state_dict"].items() if k.startswith(_PREFIX)}
    model = rebuild(record, weights)
    if record.source is None:
        _log.warning("the policy was given as an object: its tokenizer is not known, so none is exported")
    return export_model(model, output, tokenizer=record.source, merge=merge)


def _tokenizer_or_none(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model source; weights are worth exporting without one."""
    try:
        return load_tokenizer(source)
    except ValueError as error:
        _log.warning("exported without a tokenizer: %s", str(error).splitlines()[0])
        return None


def _read(checkpoint: Path) -> dict[str, Any]:
    if checkpoint.is_dir():
        from lightning_dpo.parallel.checkpoints import read_folder

        return read_folder(checkpoint)
    if not checkpoint.is_file():
        raise ValueError(f"`checkpoint` must be a file that the trainer saved, got {str(checkpoint)!r}")
    content: dict[str, Any] = torch.load(checkpoint, weights_only=True, map_location="cpu")
    return content


def rebuild(record: ModelRecord, weights: dict[str, Any]) -> nn.Module:
    """A model from its description and its weights, all of them or the adapter's alone.

    Args:
        record: What the checkpoint says.
        weights: By name in the policy.

    Raises:
        ValueError: If the description is not enough.
    """
    if record.config is None:
        raise ValueError(
            "the checkpoint is of a module that is not a Hugging Face model; load it with your own code"
        )
    if record.lora is not None and all("lora_" in name for name in weights):
        if record.source is None:
            raise ValueError(
                "the checkpoint holds an adapter only, and its base model was given as an object; "
                "export from Python with `module.export`"
            )
        model = apply_lora(load_model(record.source), LoraSettings(**record.lora))
        unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
        assert not unexpected, f"adapter weights that the model lacks: {unexpected[:3]}"
        return model
    values = json.loads(record.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    auto: Any = AutoModelForCausalLM
    plain: nn.Module = auto.from_config(config, dtype=next(iter(weights.values())).dtype)
    if record.lora is not None:
        plain = apply_lora(plain, LoraSettings(**record.lora))  # type: ignore[arg-type]
    plain.load_state_dict(weights)
    return plain


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
