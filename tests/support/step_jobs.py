"""What the ranks of a distributed test run; the same functions run in one process to compare with."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from tiny_models import random_pairs, tiny_model
from torch import distributed
from torch.optim import AdamW
from torch.utils.data import DataLoader
from training import trainer

from lightning_dpo import DPOModule, PairBatch
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.parallel import FSDP2Strategy, full_state, is_sharded
from lightning_dpo.parallel.sharding import local
from lightning_dpo.training.base import PolicyModule

STEPS = 20
PAIRS = 4
"""Pairs of a step, over all ranks."""


class Run(NamedTuple):
    """What a training run came to.

    Attributes:
        losses: Mean loss of each step, over the pairs of all ranks.
        norms: Gradient norm of each step.
        weights: The policy's whole weights at the end; empty where this rank gets none of them.
        held: Share of the policy's and of the reference's elements that this rank holds.
    """

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    held: tuple[float, float | None]


class Recorder(pl.Callback):
    """The loss of each step over all ranks."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        losses = pl_module.latest.losses.double()
        total = torch.stack([losses.sum(), torch.tensor(len(losses)).double()])
        if distributed.is_initialized():
            distributed.all_reduce(total)
        self.losses.append(float(total[0] / total[1]))
        self.norms.append(float(trainer.callback_metrics.get("train/grad_norm", math.nan)))


class Pairs(pl.LightningDataModule):
    """Each rank's part of each step's pairs."""

    def train_dataloader(self) -> DataLoader:
        rank, count = rank_and_count()
        pairs, share = random_pairs(PAIRS * STEPS), PAIRS // count
        starts = range(rank * share, len(pairs), PAIRS)
        return DataLoader([PairBatch.from_pairs(pairs[i : i + share]) for i in starts], batch_size=None)


def rank_and_count() -> tuple[int, int]:
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def adamw(params: Any) -> AdamW:
    # Of gradients near 0, Adam's first steps are all rounding below this eps.
    return AdamW(params, lr=1e-2, eps=1e-5)


def fit(
    *,
    method: type[PolicyModule] = DPOModule,
    strategy: str = "auto",
    model: str = "llama",
    source: str | None = None,
    lora: bool = False,
    sharding: dict[str, Any] | None = None,
    precision: Any = "32-true",
    accumulate: int = 1,
    callbacks: Sequence[pl.Callback] = (),
    **options: Any,
) -> Run:
    """Train a tiny model for some steps."""
    os.environ.pop("PL_GLOBAL_SEED", None)  # from another test; strategies go back to it
    torch.manual_seed(0)
    module = method(
        tiny_model(model) if source is None else source,
        optimizer=adamw,
        lora=LoraSettings(r=4, alpha=8) if lora else None,
        **options,
    )
    recorder = Recorder()
    run = trainer(
        devices=rank_and_count()[1],
        strategy=FSDP2Strategy(**(sharding or {})) if strategy == "fsdp2" else strategy,
        callbacks=[recorder, *callbacks],
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        precision=precision,
        accumulate_grad_batches=accumulate,
    )
    run.fit(module, datamodule=Pairs())
    reference = getattr(module, "reference_model", None)
    held = (share(module.policy), None if reference is None else share(reference))
    return Run(recorder.losses, recorder.norms, full_weights(module), held)


@functools.cache
def in_one_process(model: str, lora: bool) -> Run:
    """What distributed runs are compared with."""
    return fit(model=model, lora=lora)


def assert_same(run: Run, expected: Run) -> None:
    assert run.losses == pytest.approx(expected.losses, abs=1e-5)
    assert run.norms == pytest.approx(expected.norms, rel=1e-3)
    torch.testing.assert_close(run.weights, expected.weights, atol=1e-4, rtol=1e-3)


def reductions(**options: Any) -> tuple[int, Run]:
    """How often a block's gradients were reduced in a run of `fit`, and the run."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    original, count = group.foreach_reduce, 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    group.foreach_reduce = counting
    try:
        run = fit(strategy="fsdp2", **options)
    finally:
        group.foreach_reduce = original
    return count, run


def averages_of_replicas(**options: Any) -> tuple[int, Run]:
    """How often gradients were averaged between two replicas in a run of `fit`, and the run."""
    original, count = distributed.all_reduce, 0

    def counting(*args: Any, group: Any = None, **kwargs: Any) -> Any:
        nonlocal count
        count += group is not None and distributed.get_world_size(group) == 2
        return original(*args, group=group, **kwargs)

    distributed.all_reduce = counting
    try:
        run = fit(strategy="fsdp2", **options)
    finally:
        distributed.all_reduce = original
    return count, run


def full_weights(module: PolicyModule) -> dict[str, torch.Tensor]:
    """The policy's weights, and the reward's head where there is one; every rank must call this."""
    head = module.reward_head_weight()
    whole = full_state(module.policy) if is_sharded(module.policy) else module.policy.state_dict()
    weights = {name: value.detach().clone() for name, value in whole.items()}
    return weights if head is None or not weights else {**weights, "reward_head": head.clone()}


def share(model: torch.nn.Module) -> float:
    """Which part of a model's elements this rank holds."""
    parameters = list(model.parameters())
    return sum(local(p).numel() for p in parameters) / sum(p.numel() for p in parameters)
