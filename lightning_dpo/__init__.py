"""Direct Preference Optimization for PyTorch Lightning, with Ray Tune search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dpo.data.datamodule import PreferenceDataModule
    from lightning_dpo.data.feedback import FeedbackDataModule
    from lightning_dpo.models.lora import LoraSettings
    from lightning_dpo.training.base import PolicyModule
    from lightning_dpo.training.dpo import DPOModule
    from lightning_dpo.training.kto import KTOModule
    from lightning_dpo.training.online import OnlineDPOModule
    from lightning_dpo.training.ppo import PPOModule
    from lightning_dpo.types import (
        FeedbackBatch,
        PairBatch,
        PairLogps,
        PreferencePair,
        TokenExample,
        TokenPair,
    )

__all__ = [
    "DPOModule",
    "FeedbackBatch",
    "FeedbackDataModule",
    "KTOModule",
    "LoraSettings",
    "OnlineDPOModule",
    "PPOModule",
    "PairBatch",
    "PairLogps",
    "PolicyModule",
    "PreferenceDataModule",
    "PreferencePair",
    "TokenExample",
    "TokenPair",
]

__version__ = "0.1.0"

_HOMES = {
    "DPOModule": "lightning_dpo.training.dpo",
    "KTOModule": "lightning_dpo.training.kto",
    "LoraSettings": "lightning_dpo.models.lora",
    "OnlineDPOModule": "lightning_dpo.training.online",
    "PPOModule": "lightning_dpo.training.ppo",
    "PolicyModule": "lightning_dpo.training.base",
    "PreferenceDataModule": "lightning_dpo.data.datamodule",
    "FeedbackDataModule": "lightning_dpo.data.feedback",
    "FeedbackBatch": "lightning_dpo.types",
    "PairBatch": "lightning_dpo.types",
    "PairLogps": "lightning_dpo.types",
    "PreferencePair": "lightning_dpo.types",
    "TokenExample": "lightning_dpo.types",
    "TokenPair": "lightning_dpo.types",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import lightning_dpo` alone stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
