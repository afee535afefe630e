from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, random_pairs, tiny_model
from training import History, loader, sgd, trainer
from transformers import AutoModelForCausalLM

from lightning_dpo import DPOModule


def fit(module: DPOModule, **options: Any) -> None:
    trainer(**options).fit(module, loader())


def assert_unchanged(module: DPOModule, before: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(module.policy.state_dict(), before, rtol=0, atol=0)


def test_a_wrong_reference_stops_before_the_first_step() -> None:
    policy = tiny_model(seed=0)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    module = DPOModule(policy, reference=tiny_model(seed=1), optimizer=sgd)
    with pytest.raises(
        ValueError, match=r"loss .* where 0\.6931 is due.*reference is another model"
    ) as error:
        fit(module)
    assert "startup_check=False" in str(error.value)
    assert_unchanged(module, before)


def test_a_reference_that_is_meant_to_differ_can_be_used() -> None:
    module = DPOModule(tiny_model(seed=0), reference=tiny_model(seed=1), optimizer=sgd, startup_check=False)
    fit(module)


def test_dropout_is_named() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["gpt2"]))
    with pytest.raises(ValueError, match=r"dropout is on in the policy.*disable_dropout=True"):
        fit(DPOModule(model, disable_dropout=False, optimizer=sgd))


def test_dropout_that_is_a_number_of_a_layer_is_off() -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.attention_dropout = 0.5
    history = History()
    module = DPOModule(AutoModelForCausalLM.from_config(config), optimizer=sgd)
    trainer(callbacks=[history]).fit(module, loader())
    assert history.values["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_difference_is_judged_by_the_token() -> None:
    """Rounding adds up over a long completion: more than is allowed a token, and no error."""
    reference = tiny_model()
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.0003)
    module = DPOModule(tiny_model(), reference=reference, optimizer=sgd)
    trainer(max_steps=1).fit(module, loader(random_pairs(4, longest=60)))
    seen = module.latest
    assert seen is not None
    assert seen.policy is not None
    assert seen.reference is not None
    assert float((seen.policy.chosen - seen.reference.chosen).abs().max()) > 1e-3


def test_dtypes_are_named() -> None:
    policy = tiny_model()
    module = DPOModule(policy, optimizer=sgd, attn_implementation="sdpa")
    module.configure_model()
    # The reference would follow the policy's type; keep it from doing so.
    module.reference.match = lambda policy: None
    module.policy.to(torch.float64)
    with pytest.raises(ValueError, match="dtypes differ: policy float64, reference float32"):
        fit(DPOModuleWithLossyReference.of(module))


class DPOModuleWithLossyReference(DPOModule):
    """A reference whose weights were rounded, as by a load in the wrong type."""

    @classmethod
    def of(cls, module: DPOModule) -> DPOModule:
        reference = module.reference_model
        assert reference is not None
        reference.to(torch.bfloat16).to(torch.float32)
        return module


def test_a_nan_is_not_agreement() -> None:
    policy = tiny_model()
    policy.lm_head.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="policy and reference must agree"):
        fit(DPOModule(policy, optimizer=sgd, layout="concatenated"))


def test_the_check_looks_at_the_first_batch_only() -> None:
    history = History()
    module = DPOModule(tiny_model(), optimizer=sgd)
    trainer(max_epochs=3, accumulate_grad_batches=2, callbacks=[history]).fit(module, loader())
    assert abs(history.values["train/logratio/margin"][-1]) > 0.1
