"""FlexAttention as GPUs run it, with its gradients, computed plainly by torch in place of a kernel."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model
from torch.nn.attention import flex_attention
from transformers.integrations.flex_attention import WrappedFlexAttention

from lightning_dpo.scoring import select
from lightning_dpo.scoring.forward import ScoringPlan


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_flex_attention_has_the_gradients_of_plain_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses gradients of FlexAttention on a CPU; they are there all the same without a compiler."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(WrappedFlexAttention, "__init__", lambda *_: None)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda _: flex_attention.flex_attention)
    monkeypatch.setattr(select, "FASTEST", {"cpu": ("flex_attention",)})
    found = select.select_plan(tiny_model(name), may_switch_attention=True)
    assert (found.plan, found.attention) == (ScoringPlan("shared", chunked_head=True), "flex_attention")
    assert found.gradient_error is not None
    assert found.gradient_error < 1e-5
