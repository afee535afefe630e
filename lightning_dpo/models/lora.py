"""Low-rank adapters through peft: few weights train, and switched off they leave the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LoraSettings", "apply_lora"]


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adaptation (https://arxiv.org/abs/2106.09685); other peft configurations go in ready made.

    Attributes:
        r: Rank of the update.
        alpha: The update is scaled by alpha / r.
        dropout: Dropout on the adapter's input. Anything but 0 makes log-probabilities noisy.
        target_modules: Names of the layers that get an adapter, or "all-linear" for all but the head.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


def apply_lora(model: PreTrainedModel, settings: LoraSettings) -> nn.Module:
    """Wrap a model so that only adapter weights train; the base weights are frozen in place.

    Raises:
        ValueError: If peft is missing, or the settings do not fit the model.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            '`lora` needs the package peft, which is not installed; run `pip install "lightning-dpo[lora]"`'
        ) from error
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )
    wrapped: nn.Module = peft.get_peft_model(model, config)
    return wrapped
