from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import CONFIGS, tiny_model
from training import loader, sgd, trainer
from transformers import AutoModelForCausalLM

from lightning_dpo import DPOModule
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.training.callbacks.reference_sync import ReferenceSync
from lightning_dpo.training.saving.export import export_checkpoint

State = dict[str, torch.Tensor]


class Watch(pl.Callback):
    """Policy and reference after each batch."""

    def __init__(self) -> None:
        self.policy: list[State] = []
        self.reference: list[State] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.policy.append(copied(pl_module.policy))
        self.reference.append(copied(pl_module.reference_model))


def copied(model: torch.nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def fit(*callbacks: pl.Callback, **options: Any) -> DPOModule:
    module = DPOModule(tiny_model(), optimizer=sgd)
    trainer(callbacks=list(callbacks), **options).fit(module, loader(), ckpt_path=None)
    return module


@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0])
def test_the_reference_follows(alpha: float) -> None:
    watch = Watch()
    fit(ReferenceSync(every=2, alpha=alpha), watch, max_epochs=2)
    expected = copied(tiny_model())
    for step, (policy, reference) in enumerate(zip(watch.policy, watch.reference, strict=True), start=1):
        if step % 2 == 0:
            expected = {name: alpha * policy[name] + (1 - alpha) * value for name, value in expected.items()}
        torch.testing.assert_close(reference, expected, atol=1e-6, rtol=1e-6)
        if alpha == 1 and step % 2 == 0:
            assert all(torch.equal(value, policy[name]) for name, value in reference.items())


def test_steps_are_counted_and_not_batches() -> None:
    sync = ReferenceSync(every=1, alpha=0.5)
    fit(sync, accumulate_grad_batches=2, max_epochs=2)
    assert sync.updates == 4


def test_the_reference_is_not_trained_and_stays_in_eval_mode() -> None:
    module = fit(ReferenceSync(every=1))
    reference = module.reference_model
    assert reference is not None
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    trained = {id(p) for group in module.optimizers().param_groups for p in group["params"]}
    assert trained.isdisjoint(id(p) for p in reference.parameters())
    module.train()
    batch = next(iter(loader()))
    module.score(batch)
    assert not reference.training


def test_a_run_resumes_with_the_reference_it_had(tmp_path: Path) -> None:
    ends = []
    for checkpoint in (None, tmp_path / "step=4.ckpt"):
        module = DPOModule(tiny_model(), optimizer=sgd)
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        saving = saving if checkpoint is None else None
        sync = ReferenceSync(every=3, alpha=0.5)
        run = trainer(
            callbacks=[sync, *([saving] if saving else [])], enable_checkpointing=bool(saving), max_epochs=2
        )
        run.fit(module, loader(), ckpt_path=checkpoint)
        ends.append((copied(module.policy), copied(module.reference_model), sync.updates))
    assert ends[0][2] == ends[1][2] == 2
    for one, other in zip(ends[0][:2], ends[1][:2], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())

    with pytest.raises(ValueError, match="`reference` must be the one"):
        trainer(max_epochs=2).fit(
            DPOModule(tiny_model(), optimizer=sgd), loader(), ckpt_path=tmp_path / "step=4.ckpt"
        )
    export_checkpoint(tmp_path / "step=4.ckpt", tmp_path / "exported")


def deeper_model() -> Any:
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_hidden_layers = 3
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "cached"}, "got CachedReference"),
        ({"lora": LoraSettings(r=2)}, "got AdapterReference"),
        ({"lora": LoraSettings(r=2), "reference": "adapter"}, "got AdapterReference"),
        ({"lora": LoraSettings(r=2), "reference": tiny_model()}, "without an adapter"),
        ({"reference": deeper_model()}, "architecture and without an adapter; 9 weights differ"),
    ],
)
def test_references_that_cannot_follow_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path))
    module = DPOModule(tiny_model(), optimizer=sgd, **options)
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[ReferenceSync(every=2)]).fit(module, loader())


@pytest.mark.parametrize("settings", [{"every": 0}, {"every": 1, "alpha": 0.0}, {"every": 1, "alpha": 1.1}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        ReferenceSync(**settings)
