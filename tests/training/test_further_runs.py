"""A module that one trainer after another takes: how it is scored follows what each of them computes in."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from training import loader, sgd, trainer
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import lightning_dpo.scoring.select as select_module
import lightning_dpo.training.base as base_module
from lightning_dpo import DPOModule
from lightning_dpo.scoring.select import select_plan, still_holds

HALF_ONLY = "test_half_only"


def half_only(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """Attention that refuses float32, as kernels for GPUs do."""
    if torch.is_autocast_enabled("cpu"):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    raise RuntimeError("only half precision is supported")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The type that each trial computed in."""
    AttentionInterface.register(HALF_ONLY, half_only)
    monkeypatch.setattr(select_module, "FASTEST", {"cpu": (HALF_ONLY, select_module.PREFIX_ATTENTION)})
    select, types = base_module.select_plan, []

    def counting(*args: Any, **options: Any) -> Any:
        found = select(*args, **options)
        types.append(found.precision)
        return found

    monkeypatch.setattr(base_module, "select_plan", counting)
    return types


class Early(pl.Callback):
    """Asks for the plan before the module's own hooks do, as filling the reference's cache does."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.plan()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.plan()


@pytest.mark.parametrize("callbacks", [[], [Early()]])
def test_a_run_in_another_precision_chooses_anew(callbacks: list[pl.Callback], tried: list[str]) -> None:
    module = DPOModule(tiny_model(), optimizer=sgd, startup_check=False)
    trainer(precision="bf16-mixed", max_steps=1, callbacks=callbacks).fit(module, loader())
    assert module.policy.config._attn_implementation == HALF_ONLY
    trainer(callbacks=callbacks).validate(module, loader(), verbose=False)
    assert tried == ["bfloat16", "float32"]
    for model in (module.policy, module.reference_model):
        assert model.config._attn_implementation == select_module.PREFIX_ATTENTION
    trainer(precision="bf16-mixed", max_steps=1, callbacks=callbacks).fit(module, loader(), loader(count=4))
    assert tried == ["bfloat16", "float32", "bfloat16"]
    for model in (module.policy, module.reference_model):
        assert model.config._attn_implementation == HALF_ONLY


def test_a_run_in_the_same_precision_does_not(tried: list[str]) -> None:
    module = DPOModule(tiny_model(), optimizer=sgd, startup_check=False)
    for _ in range(2):
        trainer(max_steps=1).fit(module, loader(), loader(count=4))
        trainer().validate(module, loader(), verbose=False)
    assert tried == ["float32"]


def test_a_choice_holds_for_the_device_that_it_was_made_on() -> None:
    model = tiny_model()
    found = select_plan(model, may_switch_attention=True)
    assert still_holds(found, model, device=torch.device("cpu"))
    assert not still_holds(found, model, device=torch.device("cuda"))
    assert model.config._attn_implementation == "sdpa"


def test_the_reference_follows_the_policy_in_every_run() -> None:
    module = DPOModule(tiny_model(), optimizer=sgd)
    trainer(max_steps=1).fit(module, loader())
    assert module.reference_model is not None
    module.reference_model.double()
    trainer().validate(module, loader(), verbose=False)
    assert {p.dtype for p in module.reference_model.parameters()} == {torch.float32}
