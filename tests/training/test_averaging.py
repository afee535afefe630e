"""Callbacks of Lightning that average weights: of the policy, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from tiny_models import tiny_model
from torch import Tensor
from training import loader, sgd, trainer
from transformers import AutoModelForCausalLM

from lightning_dpo import DPOModule
from lightning_dpo.training.saving.export import export_checkpoint

State = dict[str, Tensor]


class Weights(pl.Callback):
    """The policy's weights at the start of each epoch, and after each step."""

    def __init__(self) -> None:
        self.epochs: list[State] = []
        self.steps: list[State] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.epochs.append(copied(pl_module.policy))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.steps.append(copied(pl_module.policy))


def copied(model: torch.nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def mean(states: list[State]) -> State:
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def assert_averaged(module: DPOModule, expected: State, last: State) -> None:
    torch.testing.assert_close(copied(module.policy), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected["lm_head.weight"], last["lm_head.weight"], atol=1e-3)
    assert module.reference_model is not None
    torch.testing.assert_close(copied(module.reference_model), copied(tiny_model()), rtol=0, atol=0)


def test_an_average_of_nothing_is_refused_before_a_model_is_loaded() -> None:
    module = DPOModule("./no-such-model")
    averaging = StochasticWeightAveraging(swa_lrs=0.1)
    with pytest.raises(ValueError, match=r"would average nothing: call `module.configure_model\(\)` before"):
        trainer(callbacks=[averaging]).fit(module, loader())


def test_a_validation_averages_nothing_anyway() -> None:
    averaging = StochasticWeightAveraging(swa_lrs=0.1)
    trainer(callbacks=[averaging]).validate(DPOModule(tiny_model()), loader(), verbose=False)


def test_stochastic_averages_are_the_policy_s_once_it_is_built() -> None:
    module, weights = DPOModule(tiny_model(), optimizer=sgd), Weights()
    module.configure_model()
    averaging = StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=2, annealing_epochs=1)
    trainer(callbacks=[averaging, weights], max_epochs=4).fit(module, loader())
    assert_averaged(module, mean(weights.epochs[1:]), weights.steps[-1])


def test_lightning_s_weight_averages_are_the_policy_s(tmp_path: Path) -> None:
    module, weights = DPOModule(tiny_model(), optimizer=sgd), Weights()
    keep = ModelCheckpoint(tmp_path, filename="last", save_top_k=1)
    run = trainer(callbacks=[WeightAveraging(), weights, keep], max_epochs=2, enable_checkpointing=True)
    run.fit(module, loader())
    assert len(weights.steps) == 8
    assert_averaged(module, mean(weights.steps), weights.steps[-1])
    exported = AutoModelForCausalLM.from_pretrained(
        export_checkpoint(tmp_path / "last.ckpt", tmp_path / "out")
    )
    torch.testing.assert_close(copied(exported), mean(weights.steps), rtol=1e-5, atol=1e-6)


def test_moving_averages_are_the_policy_s() -> None:
    module, weights = DPOModule(tiny_model(), optimizer=sgd), Weights()
    trainer(callbacks=[EMAWeightAveraging(decay=0.5), weights], max_epochs=1).fit(module, loader())
    expected = weights.steps[0]
    for state in weights.steps[1:]:
        expected = {name: 0.5 * expected[name] + 0.5 * state[name] for name in expected}
    assert_averaged(module, expected, weights.steps[-1])
