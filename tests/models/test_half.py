"""Frozen weights in 16 bits: those under an adapter, and a reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from training import History, loader, sgd, trainer

from lightning_dpo import DPOModule
from lightning_dpo.models.lora import LoraSettings


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tiny_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def train(folder: str, **options: Any) -> tuple[DPOModule, list[float]]:
    history = History()
    module = DPOModule(folder, optimizer=sgd, **options)
    trainer(max_epochs=3, callbacks=[history]).fit(module, loader())
    return module, history.values["train/loss"]


def test_an_adapter_trains_on_weights_in_16_bits(folder: str) -> None:
    module, losses = train(folder, lora=LoraSettings(r=4, alpha=8), dtype="bfloat16")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0] - 0.05
    types = {("lora_" in name, p.dtype) for name, p in module.policy.named_parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("given", ["name", "module"])
def test_a_frozen_reference_may_be_kept_in_16_bits(folder: str, given: str) -> None:
    policy = folder if given == "name" else tiny_model()
    module, losses = train(policy, reference_dtype="bfloat16")  # type: ignore[arg-type]
    assert module.reference_model is not None
    assert {p.dtype for p in module.reference_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.policy.parameters()} == {torch.float32}
    assert losses[0] == pytest.approx(0.6931, abs=2e-2)
    assert losses[-1] < losses[0] - 0.05


def test_what_does_not_go_together_is_said_before_a_model_is_loaded() -> None:
    with pytest.raises(ValueError, match='`reference_dtype="bfloat16"` is for a reference with weights'):
        DPOModule("nowhere", reference="cached", reference_dtype="bfloat16")
    with pytest.raises(ValueError, match="under an adapter"):
        DPOModule("nowhere", lora=LoraSettings(), reference_dtype="bfloat16")
