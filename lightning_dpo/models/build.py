"""From settings to models: load the policy, prepare it for training, and make its reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_dpo.models.load import disable_dropout, load_model
from lightning_dpo.models.lora import LoraSettings, apply_lora
from lightning_dpo.reference.base import AdapterReference, FrozenReference, NoReference, Reference

__all__ = ["PolicySettings", "build_policy", "build_reference", "load_frozen"]


class PolicySettings(NamedTuple):
    """What of DPOModule's arguments shapes the policy; see there."""

    policy: str | nn.Module
    lora: LoraSettings | None
    dtype: torch.dtype
    attn_implementation: str | None
    gradient_checkpointing: bool
    disable_dropout: bool
    trust_remote_code: bool


def build_policy(settings: PolicySettings) -> nn.Module:
    """Load the policy and prepare it for training.

    Raises:
        ValueError: If the source cannot be loaded, or LoRA or gradient checkpointing do not go with it.
    """
    model = _load(settings.policy, settings) if isinstance(settings.policy, str) else settings.policy
    if settings.disable_dropout:
        disable_dropout(model)
    if settings.lora is not None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"`lora` needs a Hugging Face model as `policy`, got {type(model).__name__}")
        model = apply_lora(model, settings.lora)
    if settings.gradient_checkpointing:
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise ValueError(
                "`gradient_checkpointing` needs a Hugging Face model as `policy`, got "
                f"{type(model).__name__}; checkpoint inside your own module"
            )
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def build_reference(source: str | nn.Module, *, policy: nn.Module, settings: PolicySettings) -> Reference:
    """Make the reference before the policy changes.

    Args:
        source: DPOModule's `reference`.
        policy: The policy, as loaded.
        settings: What the policy was made from; a reference given by name is loaded the same way.

    Raises:
        ValueError: If the source cannot be loaded or does not go with the policy.
    """
    if isinstance(source, nn.Module):
        return FrozenReference(source, policy=policy, name=type(source).__name__)
    if source == "none":
        return NoReference()
    # A fresh adapter changes nothing, so switched off it is the policy at the start: no copy is needed.
    if source == "adapter" or (source == "frozen" and settings.lora is not None):
        return AdapterReference(policy)
    if source == "frozen":
        return FrozenReference.copy_of(policy)
    return load_frozen(source, policy=policy, settings=settings)


def load_frozen(source: str, *, policy: nn.Module, settings: PolicySettings) -> FrozenReference:
    """Load a reference by name, in the way the policy is loaded.

    Raises:
        ValueError: If the source cannot be loaded or does not go with the policy.
    """
    return FrozenReference(_load(source, settings), policy=policy, name=source)


def _load(source: str, settings: PolicySettings) -> PreTrainedModel:
    return load_model(
        source,
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
    )
