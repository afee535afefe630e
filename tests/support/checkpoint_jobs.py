"""Runs that are saved on some ranks and go on with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from resume_jobs import train
from step_jobs import full_weights, rank_and_count
from torn import last as last_checkpoint

from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.parallel import FSDP2Strategy, is_sharded
from lightning_dpo.training.callbacks.reference_sync import ReferenceSync


class Trained(NamedTuple):
    """What a run came to.

    Attributes:
        steps: Optimizer steps taken in all.
        seen: Pairs that this rank trained on after the checkpoint, by their chosen ids.
        weights: The policy's whole weights; empty where this rank gets none.
        metrics: Validation metrics.
    """

    steps: int
    seen: list[tuple[int, ...]]
    weights: dict[str, torch.Tensor]
    metrics: dict[str, float]


class Seen(pl.Callback):
    """Which pairs a rank trained on."""

    def __init__(self) -> None:
        self.pairs: list[tuple[int, ...]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        parts = batch.chosen_ids.split(batch.chosen_lengths.tolist())
        self.pairs += [
            tuple(part.tolist()) for part, weight in zip(parts, batch.weights, strict=True) if weight
        ]


def run(
    model: str,
    *,
    strategy: str = "auto",
    full: bool = False,
    lora: bool = False,
    sync: bool = False,
    export_to: Path | None = None,
    merge: bool = True,
    steps_of: int = 2,
    last: Path | None = None,
    mesh: tuple[int, int] | None = None,
    **options: Any,
) -> Trained:
    """Train, saving or resuming as the options of `resume_jobs.train` say."""
    seen = Seen()
    saving = [] if last is None else [last_checkpoint(last)]
    fsdp2 = FSDP2Strategy(save_distributed_checkpoint=not full, device_mesh=mesh)
    sharding = fsdp2 if strategy == "fsdp2" else strategy
    module = train(
        model,
        callbacks=[seen, *saving, *([ReferenceSync(every=2, alpha=0.5)] if sync else [])],
        trainer_options={
            "strategy": sharding,
            "devices": rank_and_count()[1],
            "accumulate_grad_batches": steps_of,
            **({} if last is None else {"enable_checkpointing": True}),
        },
        lora=LoraSettings(r=2, target_modules=["c_attn"]) if lora else None,
        **options,
    )
    if export_to is not None:
        module.export(export_to, merge=merge)
    metrics = {k: float(v) for k, v in module.trainer.callback_metrics.items() if k.startswith("val/")}
    weights = full_weights(module) if is_sharded(module.policy) or module.global_rank == 0 else {}
    return Trained(module.trainer.global_step, seen.pairs, weights, metrics)
