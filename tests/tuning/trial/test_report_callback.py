from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from tiny_models import tiny_model
from torch import nn

from lightning_dpo import DPOModule
from lightning_dpo.losses import SimPOLoss
from lightning_dpo.tuning.trial.report_callback import reference_passes


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
