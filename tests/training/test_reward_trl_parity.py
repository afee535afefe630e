"""Step for step beside TRL's RewardTrainer: same weights, token ids and optimizer, so the same losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from tiny_models import random_pairs, tiny_model
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader
from training import PairsWithMargins, trainer
from transformers import AutoModelForSequenceClassification
from trl_peer import EOS, PAD, SETTINGS, word_tokenizer

from lightning_dpo import TokenPair
from lightning_dpo.training.reward_model import RewardModule

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

STEPS = 8
BATCH_SIZE = 3
LEARNING_RATE = 5e-3
MAX_GRAD_NORM = 0.5


class Run(NamedTuple):
    """A training run: the loss and accuracy of every step, and the weights at the end."""

    losses: list[float]
    accuracies: list[float]
    backbone: dict[str, Tensor]
    head: Tensor


def ended_pairs() -> list[TokenPair]:
    pairs = random_pairs(STEPS * BATCH_SIZE, seed=1)
    return [TokenPair(p.prompt_ids, [*p.chosen_ids, EOS], [*p.rejected_ids, EOS]) for p in pairs]


def margins_of(pairs: Sequence[TokenPair]) -> list[float]:
    return [index % 4 / 2 for index in range(len(pairs))]


def starting_head() -> Tensor:
    return 0.2 * torch.randn(1, 32, generator=torch.Generator().manual_seed(3))


def classifier(name: str) -> Any:
    lm = tiny_model(name)
    config = lm.config
    config.num_labels, config.pad_token_id = 1, PAD
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(lm.base_model.state_dict())
    model.score.weight.data.copy_(starting_head())
    return model


def run_trl(name: str, pairs: Sequence[TokenPair], folder: Path, *, margins: bool) -> Run:
    losses: list[float] = []
    accuracies: list[float] = []

    class Recording(trl.RewardTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            accuracies.append(self._metrics["train"]["accuracy"][-1])
            return loss

    rows = [
        {
            "chosen_ids": [*p.prompt_ids, *p.chosen_ids],
            "rejected_ids": [*p.prompt_ids, *p.rejected_ids],
            **({"margin": margin} if margins else {}),
        }
        for p, margin in zip(pairs, margins_of(pairs), strict=True)
    ]
    settings = trl.RewardConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        **SETTINGS,
    )
    run = Recording(
        model=classifier(name),
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
    )
    run.train()
    weights = run.model.base_model.state_dict()
    return Run(losses, accuracies, weights, run.model.score.weight.detach())


class Recorder(pl.Callback):
    """Every batch's loss and accuracy, as the module recorded them."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.losses.append(float(pl_module.latest.losses.mean()))
        self.accuracies.append(float(pl_module.latest.statistics["rewards/accuracy"].mean()))


def run_ours(name: str, pairs: Sequence[TokenPair], *, margins: bool, scale: float = 1.0) -> Run:
    module = RewardModule(
        tiny_model(name),
        optimizer=lambda params: AdamW(params, lr=scale * LEARNING_RATE, weight_decay=0.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
    )
    module.configure_model()
    module.reward_head.weight.data.copy_(starting_head())

    def collate(rows: list[tuple[TokenPair, float]]) -> PairsWithMargins:
        batch = PairsWithMargins.of(*zip(*rows, strict=True))
        return batch if margins else PairsWithMargins.from_pairs([pair for pair, _ in rows])

    recorder = Recorder()
    rows = list(zip(pairs, margins_of(pairs), strict=True))
    trainer(gradient_clip_val=MAX_GRAD_NORM, callbacks=[recorder]).fit(
        module, DataLoader(rows, batch_size=BATCH_SIZE, collate_fn=collate)
    )
    weights = module.policy.base_model.state_dict()
    return Run(recorder.losses, recorder.accuracies, weights, module.reward_head.weight.detach())


def worst(ours: Run, theirs: Run) -> float:
    """Largest difference of any step's loss."""
    return max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("name", ["llama", "mpt"])  # prompts shared, and not
def test_eight_steps_have_trl_s_losses(name: str, margins: bool, tmp_path: Path) -> None:
    pairs = ended_pairs()
    theirs = run_trl(name, pairs, tmp_path, margins=margins)
    ours = run_ours(name, pairs, margins=margins)
    assert len(ours.losses) == STEPS
    assert worst(ours, theirs) < 1e-4
    assert ours.accuracies == pytest.approx(theirs.accuracies)
    torch.testing.assert_close(ours.head, theirs.head, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.backbone, theirs.backbone, atol=1e-4, rtol=1e-4)
    # The comparison can fail: training moves the loss, and a slightly different rate moves it elsewhere.
    assert max(abs(loss - ours.losses[0]) for loss in ours.losses) > 1e-2
    assert worst(run_ours(name, pairs, margins=margins, scale=1.1), theirs) > 1e-3
