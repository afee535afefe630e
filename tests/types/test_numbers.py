"""Weights and margins under a trainer's 16-bit precisions, which convert the batches that they are in."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from tiny_models import random_pairs, tiny_model
from torch.utils.data import DataLoader
from training import sgd, trainer

from lightning_dpo import DPOModule, PairBatch
from lightning_dpo.types import FeedbackBatch, TokenExample

WEIGHTS, MARGINS = [0.3, 0.7, 1.1], [7.03, 0.01, 2.5]


def pairs() -> PairBatch:
    return PairBatch.from_pairs(random_pairs(3), weights=WEIGHTS, margins=MARGINS)


def feedback() -> FeedbackBatch:
    return FeedbackBatch.from_examples([TokenExample([5, k], [7], k > 3) for k in (3, 4, 5)], weights=WEIGHTS)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("make", [pairs, feedback])
def test_a_trainer_in_16_bits_rounds_no_number(make: Any, precision: Any) -> None:
    batch = replace(make(), host=make())
    for found in (converted := HalfPrecision(precision).convert_input(batch), converted.host):
        assert found.weights.tolist() == torch.tensor(WEIGHTS).tolist()
        if make is pairs:
            assert found.margins.tolist() == torch.tensor(MARGINS).tolist()
    assert DoublePrecision().convert_input(batch).weights.dtype == torch.float64


def test_other_numbers_are_set_whatever_their_type() -> None:
    batch = pairs()
    batch.weights = torch.tensor([0.5, 1.0, 0.3], dtype=torch.bfloat16)
    assert batch.weights.dtype == torch.bfloat16
    batch.margins = None
    assert batch.margins is None
    assert pickle.loads(pickle.dumps(pairs())).weights.tolist() == pairs().weights.tolist()
    assert copy.deepcopy(pairs()).margins.tolist() == pairs().margins.tolist()  # type: ignore[union-attr]


def test_a_batch_that_is_made_in_a_step_has_numbers_in_float32() -> None:
    with HalfPrecision("bf16-true").forward_context():
        for batch in (pairs(), feedback(), PairBatch.from_pairs(random_pairs(300))):
            assert batch.weights.dtype == torch.float32
        assert feedback().weights.tolist() == torch.tensor(WEIGHTS, dtype=torch.float32).tolist()


def test_a_step_in_16_bits_weighs_by_the_weights_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[torch.Tensor] = []
    step = DPOModule.step

    def watched(module: DPOModule, batch: PairBatch) -> Any:
        weights.append(batch.weights)
        return step(module, batch)

    monkeypatch.setattr(DPOModule, "step", watched)
    batches = DataLoader([0], collate_fn=lambda _: pairs())
    trainer(precision="bf16-true").fit(DPOModule(tiny_model(), optimizer=sgd), batches)
    assert weights[0].tolist() == torch.tensor(WEIGHTS).tolist()
