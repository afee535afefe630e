"""Online runs, in one process or on ranks; a module of its own so that ranks can import it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import lightning.pytorch as pl
import torch
from checkpoint_jobs import Trained, run
from judges import vowels
from resume_jobs import ROWS
from step_jobs import full_weights, rank_and_count
from tiny_models import OwnNetwork
from tiny_tokenizers import byte_level
from together_jobs import strategy_of
from training import sgd, trainer

from lightning_dpo import OnlineDPOModule, PairBatch, PreferenceDataModule
from lightning_dpo.evaluation import Sample
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.parallel import is_sharded
from lightning_dpo.training.online import JudgedPairs


class Recording(OnlineDPOModule):
    """Keeps what was sampled, and what was made of it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.judged: list[JudgedPairs] = []
        self.drawn: list[list[Sample]] = []

    def sample(self, batch: PairBatch, *, seed: int) -> list[Sample]:
        self.drawn.append(super().sample(batch, seed=seed))
        return self.drawn[-1]

    def judged_pairs(self, batch: PairBatch) -> JudgedPairs:
        self.judged.append(super().judged_pairs(batch))
        return self.judged[-1]


SHORT = {"judge": vowels, "max_new_tokens": 6}


def resumable(model: str, *, refresh_every: int | None = None, **options: Any) -> Trained:
    """A run that is saved, or goes on."""
    method = partial(
        OnlineDPOModule, **SHORT, label_scale=1.0, refresh_every=refresh_every, startup_check=False
    )
    return run(model, method=method, **options)


def ending_soon(model: str | None) -> OnlineRun:
    """Steps of which a rank's completions end long before another's, of batches that are not as large."""
    with mock.patch("lightning_dpo.training.online.end_tokens", return_value=list(range(100))):
        return few_steps(model, strategy="fsdp2", batch_size=None, tokens_per_batch=120, max_new_tokens=30)


class OnlineRun(NamedTuple):
    """What a rank of a run gives.

    Attributes:
        pairs: The new pairs of each step, on the CPU.
        drawn: Ids of the completions of each step.
        weights: The policy's whole weights at the end, where this rank has them.
        metrics: What was logged last.
    """

    pairs: list[PairBatch]
    drawn: list[list[list[int]]]
    weights: dict[str, torch.Tensor]
    metrics: dict[str, float]


def few_steps(
    model: str | None,
    *,
    strategy: str = "auto",
    steps: int = 3,
    lora: bool = False,
    batch_size: int | None = 4,
    tokens_per_batch: int | None = None,
    **options: Any,
) -> OnlineRun:
    """Train for some steps; a network of the user's own where no model is named."""
    pl.seed_everything(1, verbose=False)
    module = Recording(
        OwnNetwork(vocab=len(byte_level())) if model is None else model,
        optimizer=sgd,
        warmup_ratio=0.0,
        lora=LoraSettings(r=2, target_modules=["c_attn"]) if lora else None,
        **{**SHORT, **options},
    )
    data = PreferenceDataModule(
        ROWS,
        tokenizer=byte_level(),
        batch_size=batch_size,
        tokens_per_batch=tokens_per_batch,
        num_processes=1,
    )
    runner = trainer(devices=rank_and_count()[1], strategy=strategy_of(strategy), max_steps=steps)
    runner.fit(module, data)
    weights = full_weights(module) if is_sharded(module.policy) or module.global_rank == 0 else {}
    drawn = [[list(sample.completion_ids) for sample in samples] for samples in module.drawn]
    metrics = {name: float(value) for name, value in runner.callback_metrics.items()}
    return OnlineRun([judged.pairs for judged in module.judged], drawn, weights, metrics)


def saved_keys(checkpoint: Path) -> set[str]:
    """Names of the weights in a checkpoint of one file."""
    return set(torch.load(checkpoint, weights_only=True)["state_dict"])
