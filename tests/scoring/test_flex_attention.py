"""FlexAttention on a CPU: plain in place of a kernel, with its gradients, and as torch compiles it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_batch, tiny_model
from torch.nn.attention import flex_attention
from transformers.integrations.flex_attention import WrappedFlexAttention

from lightning_dpo.scoring import select
from lightning_dpo.scoring.forward import ScoringPlan, lay_out, score
from lightning_dpo.types import PairLogps

SHARED_PLAN = ScoringPlan("shared", chunked_head=True)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(WrappedFlexAttention, "__init__", lambda *_: None)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda _: flex_attention.flex_attention)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_flex_attention_has_the_gradients_of_plain_logits(
    uncompiled: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch refuses gradients of FlexAttention on a CPU; they are there all the same without a compiler."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(select, "FASTEST", {"cpu": ("flex_attention",)})
    found = select.select_plan(tiny_model(name), may_switch_attention=True)
    assert (found.plan, found.attention) == (SHARED_PLAN, "flex_attention")
    assert found.gradient_error is not None
    assert found.gradient_error < 1e-5


@pytest.mark.parametrize("how", ["plain", pytest.param("compiled", marks=pytest.mark.heavy)])
def test_flex_attention_computes_what_sdpa_computes(how: str, request: pytest.FixtureRequest) -> None:
    """On the CPU it has no backward pass, so values only; its block masks are those of CUDA."""
    if how == "plain":
        request.getfixturevalue("uncompiled")
    model, batch = tiny_model("llama"), random_batch(6, longest=60)
    with torch.no_grad():
        expected = PairLogps.of(score(model, batch.completions(), plan=SHARED_PLAN))
        model.set_attn_implementation("flex_attention")
        assert lay_out(batch.completions(), model=model, plan=SHARED_PLAN).input_ids.shape[1] % 128 == 0
        actual = PairLogps.of(score(model, batch.completions(), plan=SHARED_PLAN))
    for name in PairLogps._fields[:6]:
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), atol=1e-4, rtol=0, msg=name
        )
