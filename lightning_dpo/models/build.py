"""From settings to a model that is prepared for training, or frozen."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from lightning_dpo.models.load import load_model
from lightning_dpo.models.lora import LoraSettings, apply_lora
from lightning_dpo.models.modes import disable_dropout
from lightning_dpo.models.shared_base import base_model
from lightning_dpo.types.choices import Recomputation

__all__ = ["PolicySettings", "build_policy", "keeps_products", "load_as"]

_PRODUCTS = frozenset({"mm", "addmm", "_scaled_mm"})


class PolicySettings(NamedTuple):
    """The arguments of a `PolicyModule` that shape its policy; it documents them."""

    policy: str | nn.Module
    lora: LoraSettings | None
    dtype: torch.dtype
    attn_implementation: str | None
    gradient_checkpointing: Recomputation
    disable_dropout: bool
    trust_remote_code: bool


def build_policy(settings: PolicySettings) -> nn.Module:
    """Load the policy and prepare it for training.

    Raises:
        ValueError: If the source cannot be loaded, or LoRA or gradient checkpointing do not go with it.
    """
    model = load_as(settings.policy, settings) if isinstance(settings.policy, str) else settings.policy
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
        options: dict[str, Any] = {"use_reentrant": False}
        if settings.gradient_checkpointing == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, keeps_products)
        enable(gradient_checkpointing_kwargs=options)
    return model


def keeps_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what matrix products and fused attention gave; norms, activations and casts are computed anew.

    As torchtitan's selective activation checkpointing (https://arxiv.org/abs/2410.06511, section 2.1.3) does
    it by operation, but for every product. Not kept are the scores of attention that is not fused, and what
    experts gave, to which some models add biases in place.

    Args:
        context: Of torch's checkpoint.
        operation: Which one, such as aten.mm.default.
        args: Its own.
        kwargs: Likewise.
    """
    name = operation.name().split("::")[-1].split(".")[0]
    is_kept = name in _PRODUCTS or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def load_as(source: str, settings: PolicySettings) -> PreTrainedModel:
    """Load a model by name in the way the policy is loaded; under an adapter its weights may be shared.

    Raises:
        ValueError: If the source cannot be loaded.
    """
    options = (settings.dtype, settings.attn_implementation, settings.trust_remote_code)

    def load() -> PreTrainedModel:
        dtype, attention, trust = options
        return load_model(source, dtype=dtype, attn_implementation=attention, trust_remote_code=trust)

    return load() if settings.lora is None else base_model((source, *options), load)
