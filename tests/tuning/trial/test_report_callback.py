from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny_models import random_batch, tiny_model
from torch import nn
from torch.utils.data import DataLoader
from training import trainer

from lightning_dpo import DPOModule
from lightning_dpo.losses import SimPOLoss
from lightning_dpo.tuning.trial.report_callback import (
    DivergedError,
    TrialReport,
    reference_passes,
    steps_between_validations,
)


def test_a_loss_without_a_reference_makes_no_passes() -> None:
    module = DPOModule(tiny_model(), loss=SimPOLoss())
    module.configure_model()
    assert reference_passes(module) == 0


def test_a_cached_reference_counts_what_it_computed(tmp_path: Path) -> None:
    module = DPOModule(tiny_model(), reference="cached", reference_cache=str(tmp_path))
    module.configure_model()
    assert reference_passes(module) == 0


def test_a_module_of_ones_own_has_none() -> None:
    assert reference_passes(SimpleNamespace()) == 0
    assert reference_passes(SimpleNamespace(reference=nn.Linear(1, 1))) == 0


class OwnSteps(pl.LightningModule):
    """Steps its optimizer itself, and tells of its loss by logging it alone."""

    def __init__(self, loss: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = nn.Linear(1, 1)
        self.loss = loss

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.optimizers().step()
        self.log("train/loss", self.loss)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/score", 1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_that_steps_its_own_optimizer_is_reported() -> None:
    sent: list[dict[str, Any]] = []
    callback = TrialReport(lambda metrics, _: sent.append(metrics), required=("val/score",), began=0.0)
    trainer(callbacks=[callback], max_steps=2).fit(OwnSteps(0.5), torch.ones(2, 1), torch.ones(2, 1))
    assert [report["val/score"] for report in sent] == [1.0]


def test_one_whose_loss_is_no_number_has_diverged() -> None:
    callback = TrialReport(lambda *_: None, required=("val/score",), began=0.0)
    with pytest.raises(DivergedError, match="loss"):
        trainer(callbacks=[callback], max_steps=2).fit(
            OwnSteps(float("nan")), torch.ones(2, 1), torch.ones(2, 1)
        )


@pytest.mark.parametrize(
    ("batches", "between", "accumulated", "steps"),
    [
        (32, 32, 1, 32),
        (32, 8, 1, 8),
        (32, 8, 2, 4),
        (9, 9, 2, 5),  # the last step of an epoch takes what is left
        (32, 5, 1, 1),  # validations of the second epoch come at other steps than multiples of five
        (32, 8, 3, 1),
        (float("inf"), 100, 1, 1),
        (32, float("inf"), 1, 1),
    ],
)
def test_steps_between_validations(batches: float, between: float, accumulated: int, steps: int) -> None:
    run: Any = SimpleNamespace(
        num_training_batches=batches, val_check_batch=between, accumulate_grad_batches=accumulated
    )
    assert steps_between_validations(run) == steps


class Losses(pl.Callback):
    """Keeps each batch's loss."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.found.append(float(outputs["loss"]))


@pytest.mark.parametrize(("reader", "logged"), [(None, 3), ("logger", 8), ("callback", 8)])
def test_a_trial_logs_what_is_read(tmp_path: Path, reader: str | None, logged: int) -> None:
    sent: list[dict[str, Any]] = []
    report = TrialReport(lambda metrics, _: sent.append(metrics), required=("val/loss",), began=0.0)
    losses, module = Losses(), DPOModule(tiny_model(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    if reader != "callback":  # one of this package's, which need no number of training
        Losses.__module__ = "lightning_dpo.losses_of_a_test"
    try:
        names: list[str] = []
        log = module.log
        module.log = lambda name, *a, **k: (names.append(name), log(name, *a, **k))[1]  # type: ignore[method-assign]
        run = trainer(
            callbacks=[report, losses],
            max_epochs=2,
            val_check_interval=4,
            check_val_every_n_epoch=1,
            logger=CSVLogger(tmp_path) if reader == "logger" else False,
            limit_train_batches=4,
        )
        loader = DataLoader([random_batch(2, seed=k) for k in range(4)], batch_size=None)
        run.fit(module, loader, loader)
    finally:
        Losses.__module__ = __name__
    assert names.count("train/loss") == logged
    assert [metrics["train/loss"] for metrics in sent] == pytest.approx([losses.found[3], losses.found[7]])
