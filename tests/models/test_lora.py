"""What the settings of an adapter come to in the model."""

from __future__ import annotations

from pathlib import Path

from tiny_models import tiny_model

from lightning_dpo import DPOModule
from lightning_dpo.models.lora import LoraSettings


def test_scaling_and_dropout_reach_every_adapted_layer(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    settings = LoraSettings(r=4, alpha=20, dropout=0.1)
    module = DPOModule(str(tmp_path), lora=settings, disable_dropout=False)
    module.configure_model()
    adapted = [part for part in module.policy.modules() if hasattr(part, "lora_A")]
    assert len(adapted) >= 2 * 4  # the products of attention, of two layers
    assert {part.r["default"] for part in adapted} == {4}
    assert {part.scaling["default"] for part in adapted} == {20 / 4}
    assert {part.lora_dropout["default"].p for part in adapted} == {0.1}
