"""Runs that are stopped and resumed; a module of its own so that another process can import it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers as hf
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_tokenizers import byte_level
from training import trainer

from lightning_dpo import DPOModule, PreferenceDataModule

ROWS = [
    {
        "prompt": f"the sky {n} " * (1 + n % 3),
        "chosen": f" is blue {n}" * (1 + n % 4),
        "rejected": f" is green {n}",
    }
    for n in range(40)
]
EPOCHS = 2
_DPO = partial(DPOModule, startup_check=False)


class Kill(pl.Callback):
    """The process dies in the middle of a step, as a machine does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def source(folder: Path, *, seed: int = 0) -> str:
    """A model with dropout."""
    torch.manual_seed(seed)
    config = hf.GPT2Config(
        bos_token_id=0, eos_token_id=1, vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=256
    )
    hf.GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def train(
    model: str,
    *,
    method: Callable[..., Any] = _DPO,
    folder: Path | None = None,
    ckpt_path: Path | None = None,
    kill_at: int | None = None,
    every: int = 1,
    callbacks: list[pl.Callback] | None = None,
    validate: bool = True,
    data_options: dict[str, Any] | None = None,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Train with all that is random: order, dropout; and all that is uneven: batches, accumulation."""
    torch.set_num_threads(1)
    pl.seed_everything(5, verbose=False)
    module = method(
        model,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        warmup_ratio=0.5,
        **{"disable_dropout": False, **options},
    )
    data = PreferenceDataModule(
        ROWS,
        validation=ROWS[:7] if validate else None,
        tokenizer=byte_level(),
        **{"tokens_per_batch": 150, **(data_options or {})},
    )
    stops = [] if kill_at is None else [Kill(kill_at)]
    saving = (
        []
        if folder is None
        else [ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)]
    )
    settings = {
        "max_epochs": EPOCHS,
        "accumulate_grad_batches": 2,
        "enable_checkpointing": folder is not None,
        "callbacks": [*saving, *stops, *(callbacks or [])],
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        **(trainer_options or {}),
    }
    run = trainer(**settings)
    run.fit(module, data, ckpt_path=ckpt_path)
    return module
