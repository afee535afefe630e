"""Step for step beside TRL's DPOTrainer: same weights, same token ids, same optimizer, so the same losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from tiny_models import random_pairs, tiny_model
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from training import loader, trainer
from transformers import get_scheduler
from trl_peer import EOS, SETTINGS, text, word_tokenizer

from lightning_dpo import DPOModule, TokenPair
from lightning_dpo.losses import APOZeroLoss, DPOLoss, IPOLoss, PreferenceLoss, RobustDPOLoss

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

STEPS = 10
WARMUP_STEPS = 2
BATCH_SIZE = 3
ADAM_EPSILON = 1e-6  # at 1e-8 a gradient that is nothing but rounding moves a weight as far as any other
LEARNING_RATE = 5e-3
MAX_GRAD_NORM = 0.3
BETA = 0.2


class Run(NamedTuple):
    """A training run: the loss of every optimizer step, and the weights at the end."""

    losses: list[float]
    weights: dict[str, Tensor]


def pairs_for(accumulate: int) -> list[TokenPair]:
    """Enough pairs of uneven lengths for every step; completions end in EOS, which TRL would add."""
    pairs = random_pairs(STEPS * BATCH_SIZE * accumulate, seed=1)
    return [TokenPair(p.prompt_ids, [*p.chosen_ids, EOS], [*p.rejected_ids, EOS]) for p in pairs]


def rows_for_trl(pairs: Sequence[TokenPair]) -> Any:
    return datasets.Dataset.from_list(
        [dict(zip(("prompt", "chosen", "rejected"), map(text, pair), strict=True)) for pair in pairs]
    )


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def per_step(losses: Sequence[float], accumulate: int) -> list[float]:
    return torch.tensor(losses, dtype=torch.float64).view(STEPS, accumulate).mean(1).tolist()


def run_trl(pairs: Sequence[TokenPair], folder: Path, *, accumulate: int, **options: Any) -> Run:
    micro_losses: list[float] = []

    class Recording(trl.DPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            micro_losses.append(loss.item())
            return loss

    settings = trl.DPOConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=accumulate,
        learning_rate=LEARNING_RATE,
        adam_epsilon=ADAM_EPSILON,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP_STEPS,
        max_grad_norm=MAX_GRAD_NORM,
        beta=BETA,
        **SETTINGS,
        **options,
    )
    run = Recording(
        model=tiny_model(),
        ref_model=tiny_model(),
        args=settings,
        train_dataset=rows_for_trl(pairs),
        processing_class=word_tokenizer(),
    )
    columns = (run.train_dataset[name] for name in TokenPair._fields)
    assert [TokenPair(*row) for row in zip(*columns, strict=True)] == list(pairs)
    run.train()
    return Run(per_step(micro_losses, accumulate), weights(run.model))


class Losses(pl.Callback):
    """The loss of every batch, as the module recorded it."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.values.append(float(pl_module.latest.losses.mean()))


def linear(optimizer: Optimizer) -> LRScheduler:
    return get_scheduler("linear", optimizer, num_warmup_steps=WARMUP_STEPS, num_training_steps=STEPS)


def run_ours(pairs: Sequence[TokenPair], loss: PreferenceLoss, *, accumulate: int) -> Run:
    losses = Losses()
    module = DPOModule(
        tiny_model(),
        loss=loss,
        optimizer=lambda params: AdamW(params, lr=LEARNING_RATE, eps=ADAM_EPSILON, weight_decay=0.0),
        lr_scheduler=linear,
    )
    trainer(accumulate_grad_batches=accumulate, gradient_clip_val=MAX_GRAD_NORM, callbacks=[losses]).fit(
        module, loader(pairs, batch_size=BATCH_SIZE)
    )
    assert module.plan().layout == "shared"
    return Run(per_step(losses.values, accumulate), weights(module.policy))


def worst(ours: Run, theirs: Run) -> float:
    """Largest difference of any step's loss."""
    return max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))


CASES: dict[str, tuple[Callable[[float], PreferenceLoss], dict[str, Any]]] = {
    "sigmoid": (lambda beta: DPOLoss(beta=beta), {"loss_type": "sigmoid"}),
    # TRL divides log-ratios by completion lengths, as our default does
    "ipo": (lambda beta: IPOLoss(beta=beta), {"loss_type": "ipo"}),
    "apo_zero": (lambda beta: APOZeroLoss(beta=beta), {"loss_type": "apo_zero"}),
    "robust": (
        lambda beta: RobustDPOLoss(beta=beta, label_smoothing=0.1),
        {"loss_type": "robust", "label_smoothing": 0.1},
    ),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_ten_steps_have_trl_s_losses(name: str, accumulate: int, tmp_path: Path) -> None:
    make_loss, options = CASES[name]
    pairs = pairs_for(accumulate)
    theirs = run_trl(pairs, tmp_path, accumulate=accumulate, **options)
    ours = run_ours(pairs, make_loss(BETA), accumulate=accumulate)
    assert len(ours.losses) == STEPS
    assert worst(ours, theirs) < 1e-4
    torch.testing.assert_close(ours.weights, theirs.weights, atol=1e-4, rtol=1e-4)
    # the comparison can fail: training moves the loss, and a slightly different beta moves it elsewhere
    assert max(abs(loss - ours.losses[0]) for loss in ours.losses) > 1e-2
    other = run_ours(pairs, make_loss(1.1 * BETA), accumulate=accumulate)
    assert worst(other, theirs) > 1e-3
