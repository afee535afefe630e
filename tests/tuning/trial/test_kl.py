from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_folder import save_tiny

from lightning_dpo import DPOModule
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.tuning.trial.kl import KLMonitor

TRAINER: Any = None


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    names = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("model")
        save_tiny(folder)
        names.append(str(folder))
    return names[0], names[1]


def weight(model: Any) -> torch.Tensor:
    return next(model.parameters()).detach().clone()


def built(policy: str) -> Any:
    module = DPOModule(policy)
    module.configure_model()
    return module.policy


def monitored(module: DPOModule) -> Any:
    """The model that the KL is measured to, after the policy has changed."""
    monitor = KLMonitor(1)
    monitor.setup(TRAINER, module, "fit")
    module.configure_model()
    with torch.no_grad():
        next(module.policy.parameters()).add_(1)
    return monitor.reference(module)


def test_the_kl_is_to_the_policy_at_the_start(folders: tuple[str, str], tmp_path: Path) -> None:
    module = DPOModule(folders[0], reference="cached", reference_cache=str(tmp_path))
    model = monitored(module)
    assert torch.equal(weight(model), weight(built(folders[0])))
    assert not torch.equal(weight(model), weight(module.policy))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)])
def test_the_kl_is_to_the_model_that_is_named(
    folders: tuple[str, str], tmp_path: Path, lora: LoraSettings | None
) -> None:
    module = DPOModule(folders[0], reference=f"cached:{folders[1]}", reference_cache=str(tmp_path), lora=lora)
    assert torch.equal(weight(monitored(module)), weight(built(folders[1])))


def test_an_adapter_that_is_switched_off_needs_no_copy(folders: tuple[str, str], tmp_path: Path) -> None:
    module = DPOModule(folders[0], reference="cached", reference_cache=str(tmp_path), lora=LoraSettings(r=2))
    assert module.start_reference() is None
    assert monitored(module) is not None


def test_a_reference_with_weights_is_the_modules_own(folders: tuple[str, str]) -> None:
    module = DPOModule(folders[0])
    assert module.start_reference() is None
    assert monitored(module) is module.reference_model


def test_a_module_without_a_reference_is_asked_for_none() -> None:
    KLMonitor(1).setup(TRAINER, pl.LightningModule(), "fit")
