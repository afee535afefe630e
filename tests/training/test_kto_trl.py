"""Step for step beside TRL's KTOTrainer: same weights, token ids and mismatches, so the same losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from feedback_rows import feedback_loader, random_examples
from tiny_models import tiny_model
from torch import Tensor
from torch.optim import AdamW
from training import trainer
from trl_peer import EOS, SETTINGS, text, word_tokenizer

from lightning_dpo.losses import KTOLoss, UnpairedAPOZeroLoss, UnpairedLoss
from lightning_dpo.training.kto import KTOModule
from lightning_dpo.types import TokenExample

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

STEPS = 6
BATCH_SIZE = 4
LEARNING_RATE = 5e-3
BETA = 0.2
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.75}


class Run(NamedTuple):
    """A training run: loss and z0 of every step, and the weights at the end."""

    losses: list[float]
    z0: list[float]
    weights: dict[str, Tensor]


def rows_for_trl(examples: Sequence[TokenExample]) -> Any:
    """Each batch from back to front: TRL takes the completion before, and this package the one behind."""

    batches = [examples[k : k + BATCH_SIZE][::-1] for k in range(0, len(examples), BATCH_SIZE)]
    return datasets.Dataset.from_list(
        [{"prompt": text(p), "completion": text(c), "label": y} for batch in batches for p, c, y in batch]
    )


def run_trl(examples: Sequence[TokenExample], folder: Path, *, loss_type: str) -> Run:
    losses: list[float] = []
    z0: list[float] = []

    class Recording(trl.KTOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            z0.append(self._metrics["train"]["kl"][-1])
            return loss

    settings = trl.KTOConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.3,
        beta=BETA,
        loss_type=loss_type,
        **SETTINGS,
        **WEIGHTS,
    )
    run = Recording(
        model=tiny_model(),
        ref_model=tiny_model(),
        args=settings,
        train_dataset=rows_for_trl(examples),
        processing_class=word_tokenizer(),
    )
    run.train()
    weights = {name: value.detach().clone() for name, value in run.model.state_dict().items()}
    return Run(losses, z0, weights)


class Steps(pl.Callback):
    """The loss and z0 of every batch, as the module recorded them."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.z0: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.losses.append(float(pl_module.latest.losses.mean()))
        self.z0.append(float(pl_module.latest.statistics["z0"][0]))


def run_ours(examples: Sequence[TokenExample], loss: UnpairedLoss) -> Run:
    steps = Steps()
    module = KTOModule(
        tiny_model(),
        loss=loss,
        optimizer=lambda params: AdamW(params, lr=LEARNING_RATE, weight_decay=0.0),
        warmup_ratio=0.0,
    )
    trainer(gradient_clip_val=0.3, callbacks=[steps]).fit(
        module, feedback_loader(examples, batch_size=BATCH_SIZE)
    )
    return Run(steps.losses, steps.z0, module.policy.state_dict())


def worst(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


CASES: dict[str, Callable[[float], UnpairedLoss]] = {
    "kto": lambda beta: KTOLoss(beta=beta, **WEIGHTS),
    "apo_zero_unpaired": lambda beta: UnpairedAPOZeroLoss(beta=beta, **WEIGHTS),
}


@pytest.mark.parametrize("name", CASES)
def test_six_steps_have_trl_s_losses(name: str, tmp_path: Path) -> None:
    examples = random_examples(STEPS * BATCH_SIZE, seed=1, eos=EOS)
    theirs = run_trl(examples, tmp_path, loss_type=name)
    ours = run_ours(examples, CASES[name](BETA))
    assert len(ours.losses) == STEPS
    assert worst(ours.losses, theirs.losses) < 1e-4
    assert worst(ours.z0, theirs.z0) < 1e-4
    torch.testing.assert_close(ours.weights, theirs.weights, atol=1e-4, rtol=1e-4)
    # The comparison can fail: z0 is not 0 throughout, and another beta gives other losses.
    assert (max(ours.z0) > 0.1) == (name == "kto")
    assert worst(run_ours(examples, CASES[name](1.1 * BETA)).losses, theirs.losses) > 1e-3
