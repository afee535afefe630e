"""What a training step keeps: activations until the backward pass, gradients until the next step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_models import CONFIGS, random_batch, tiny_model
from torch.profiler import profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from training import loader, sgd, trainer

from lightning_dpo import DPOModule
from lightning_dpo.types.choices import Recomputation


def weights(module: DPOModule) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.policy.state_dict().items()}


class Cost(pl.Callback):
    """Operations of whole steps, and bytes that are left when the loss is there."""

    def __init__(self) -> None:
        self.flops: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.counter.__exit__(None, None, None)
        self.flops.append(self.counter.get_total_flops())


class Kept(DPOModule):
    """Measures the memory that its step takes and does not give back before the backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        with profile(profile_memory=True) as profiled:
            loss = super().training_step(batch, batch_idx)
        self.kept = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
        return loss


def operations(recomputed: Recomputation, precision: Any) -> int:
    cost = Cost()
    module = DPOModule(tiny_model(), optimizer=sgd, reference="frozen", gradient_checkpointing=recomputed)
    trainer(max_steps=2, callbacks=[cost], precision=precision).fit(module, loader())
    return cost.flops[-1]  # the plan was found in the first one


def bytes_kept(recomputed: Recomputation, precision: Any) -> int:
    module = Kept(tiny_model(), optimizer=sgd, gradient_checkpointing=recomputed)
    batch = random_batch(8, seed=0, longest=60)
    trainer(max_steps=2, precision=precision).fit(module, DataLoader([batch, batch], batch_size=None))
    return module.kept


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_selective_recomputation_repeats_no_product(precision: str) -> None:
    plain, selective, blocks = (operations(how, precision) for how in (False, "selective", True))
    assert selective == plain
    assert blocks > 1.1 * plain


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_selective_recomputation_keeps_fewer_activations(precision: str) -> None:
    plain, selective, blocks = (bytes_kept(how, precision) for how in (False, "selective", True))
    assert blocks < selective < 0.7 * plain


@pytest.mark.parametrize("name", CONFIGS)
def test_selective_recomputation_changes_no_architecture(name: str) -> None:
    ends = []
    for recomputed in (False, "selective"):
        module = DPOModule(tiny_model(name), optimizer=sgd, gradient_checkpointing=recomputed)
        trainer(max_steps=2).fit(module, loader())
        ends.append(weights(module))
    torch.testing.assert_close(ends[1], ends[0], atol=1e-6, rtol=1e-6)


def test_selective_recomputation_is_left_to_the_compiler(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which recomputes by itself; checkpoints around what it has compiled would run all of it again."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part, **_: None)
    module = DPOModule(tiny_model(), optimizer=sgd, compile_model=True, gradient_checkpointing="selective")
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer(max_steps=1).fit(module, loader())
    assert not module.policy.is_gradient_checkpointing
    assert 'gradient_checkpointing: "selective" is left to the compiler of the blocks' in caplog.text


class Watched(DPOModule):
    """Says which of its steps found gradients of earlier ones."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.__dict__.setdefault("found", []).append(
            any(parameter.grad is not None for parameter in self.policy.parameters())
        )
        return super().training_step(batch, batch_idx)


class LightningsOwn(Watched):
    """Frees gradients where Lightning does, after the forward pass."""

    def configure_callbacks(self) -> list[pl.Callback]:
        return [each for each in super().configure_callbacks() if type(each).__name__ != "FreeGradients"]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradients_of_the_last_step_are_freed_before_the_next(accumulated: int) -> None:
    ends = []
    for kind in (Watched, LightningsOwn):
        module = kind(tiny_model(), optimizer=sgd)
        trainer(max_epochs=2, accumulate_grad_batches=accumulated).fit(module, loader())
        ends.append((module.found, weights(module)))
    (found, own), (without, same) = ends
    assert found == [index % accumulated > 0 for index in range(len(found))]
    assert without == [index > 0 for index in range(len(found))]
    torch.testing.assert_close(own, same, atol=0, rtol=0)
