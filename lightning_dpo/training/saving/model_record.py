"""What a checkpoint says about its model, and the model that is made from it again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from lightning_dpo.models.build import PolicySettings
from lightning_dpo.models.load import load_model
from lightning_dpo.models.lora import LoraSettings, apply_lora
from lightning_dpo.models.unwrap import causal_lm

__all__ = [
    "POLICY_PREFIX",
    "RECORD_KEY",
    "ModelRecord",
    "adapter_state",
    "drop_base_weights",
    "rebuild",
    "untrained",
]

RECORD_KEY = "lightning_dpo"
"""Where in a checkpoint the `ModelRecord` stands."""

POLICY_PREFIX = "policy."
"""Begins the names of the policy's weights in a module's state."""


class ModelRecord(NamedTuple):
    """What a checkpoint says about its model, besides weights; plain types only.

    Attributes:
        source: Where the policy and its tokenizer came from; None for a policy given as an object.
        config: The model's Hugging Face config as JSON; None for a user's own module.
        lora: The adapter's settings, or None.
        reward_head: Name in the module's state of the map from last hidden states to rewards, for a reward
            model; None for a language model.
        generation: The model's generation settings as JSON, such as the tokens that end a turn, which its
            config need not name; None where it has none, or an older version saved it.
        chat_template: Jinja text that conversations were written with in place of the tokenizer's own; None
            where there was none but that, or an older version saved it.
    """

    source: str | None
    config: str | None
    lora: dict[str, Any] | None
    reward_head: str | None = None
    generation: str | None = None
    chat_template: str | None = None

    @classmethod
    def of(
        cls, policy: nn.Module, settings: PolicySettings, *, reward_head: str | None = None
    ) -> ModelRecord:
        """Describe a policy, and name its reward head if it has one."""
        lm: Any = causal_lm(policy)
        generation = getattr(lm, "generation_config", None) if isinstance(lm, PreTrainedModel) else None
        return cls(
            source=settings.policy if isinstance(settings.policy, str) else None,
            config=json.dumps(lm.config.to_dict()) if isinstance(lm, PreTrainedModel) else None,
            lora=None if settings.lora is None else dict(vars(settings.lora)),
            reward_head=reward_head,
            generation=None if generation is None else generation.to_json_string(),
        )


def adapter_state(state: dict[str, Any]) -> dict[str, Any]:
    """The part of a module's state that is not the frozen base model."""
    return {k: v for k, v in state.items() if not k.startswith(POLICY_PREFIX) or "lora_" in k}


def drop_base_weights(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A state-dict hook: leave `adapter_state`."""
    kept = adapter_state(state)
    for key in [key for key in state if key not in kept]:
        del state[key]


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
    plain: nn.Module = untrained(record, dtype=next(iter(weights.values())).dtype)
    if record.lora is not None:
        plain = apply_lora(plain, LoraSettings(**record.lora))  # type: ignore[arg-type]
    plain.load_state_dict(weights)
    return plain


def untrained(record: ModelRecord, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model that a record describes, without adapter and without its weights.

    Args:
        record: Of a Hugging Face model.
        dtype: Type of the weights.
    """
    assert record.config is not None, "the record of a user's own module"
    values = json.loads(record.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    if record.generation is not None:
        model.generation_config = _generation_config(record.generation)
    return model


def _generation_config(text: str) -> GenerationConfig:
    """Generation settings as a model's folder gives them: loaded ones may be saved though they contradict.

    Published settings often do, as with a temperature beside greedy decoding, and transformers refuses to
    save those that it did not load.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / GENERATION_CONFIG_NAME).write_text(text, encoding="utf-8")
        config: GenerationConfig = GenerationConfig.from_pretrained(folder)
    return config
