"""The choice of how a model is scored, on several ranks and in mixed precision."""

from __future__ import annotations

from typing import Any

import pytest
from plan_jobs import plan

from lightning_dpo.scoring.forward import ScoringPlan
from lightning_dpo.scoring.prefix_attention import PREFIX_ATTENTION

pytestmark = pytest.mark.slow

SHARED_PLAN = ScoringPlan("shared", chunked_head=True)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("model", "attention"), [("llama", PREFIX_ATTENTION), ("gemma3", "sdpa")])
def test_fsdp2_in_mixed_precision_keeps_the_cheapest_plan(
    ranks: Any, model: str, attention: str, lora: bool
) -> None:
    for found in ranks.run(plan, model=model, lora=lora):
        assert found.selection.plan == SHARED_PLAN
        assert found.attention == attention
        assert found.selection.precision == "bfloat16"
        assert found.selection.head_error <= 1e-4
        assert found.selection.shared_error > 1e-4  # float32's bound would refuse it
        assert found.selection.gradient_error > 1e-3


def test_fsdp2_falls_back_where_it_must(ranks: Any) -> None:
    for found in ranks.run(plan, model="mpt"):
        assert found.selection.plan == ScoringPlan("concatenated", chunked_head=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_other_precisions_keep_it_too(ranks: Any, precision: str) -> None:
    for found in ranks.run(plan, precision=precision):
        assert found.selection.plan == SHARED_PLAN
        assert found.selection.precision == {"32-true": "float32", "bf16-true": "bfloat16"}[precision]


@pytest.mark.parametrize("method", ["difference", "gradient_error"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_ranks_decide_alike(ranks: Any, strategy: str, method: str) -> None:
    one, other = ranks.run(plan, strategy=strategy, precision="32-true", breaks=(1, method))
    assert one.selection.plan == other.selection.plan == ScoringPlan("concatenated", chunked_head=True)
    assert one.attention == other.attention == "sdpa"
    assert "another rank" in one.selection.reason
    assert "out of memory on this rank alone" in other.selection.reason
