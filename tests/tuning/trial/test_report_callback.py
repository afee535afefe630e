from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from training import trainer

from lightning_dpo import DPOModule
from lightning_dpo.losses import SimPOLoss
from lightning_dpo.tuning.trial.report_callback import DivergedError, TrialReport, reference_passes


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
