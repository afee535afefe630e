"""What processes run that fill or use the reference cache: a test's own one, ranks, or two at once."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from tiny_models import random_pairs, tiny_model
from torch import distributed
from torch.optim import AdamW
from training import loader, sgd, trainer

from lightning_dpo import DPOModule
from lightning_dpo.models import build as builder_module
from lightning_dpo.models.load import load_model
from lightning_dpo.parallel import FSDP2Strategy
from lightning_dpo.reference.cache import store
from lightning_dpo.reference.cache.usage import CacheUsage
from lightning_dpo.reference.cached import CachedReference
from lightning_dpo.reference.fill import FillReferenceCache


class Result(NamedTuple):
    """What a run came to.

    Attributes:
        usage: What was taken from the cache, by all ranks; None without one.
        losses: Mean loss of each step over all ranks.
        loaded: Models that this rank loaded whole.
        has_reference: Whether this rank holds a reference model at the end.
    """

    usage: CacheUsage | None
    losses: list[float]
    loaded: list[str]
    has_reference: bool


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        loss = pl_module.latest.losses.double().mean()
        if distributed.is_initialized():
            distributed.all_reduce(loss)
            loss /= distributed.get_world_size()
        self.values.append(float(loss))


def fit(
    *,
    policy: str | None,
    cache: str,
    reference: str = "cached",
    strategy: str = "auto",
    count: int = 16,
    every: int = 1,
    epochs: int = 2,
    batch_size: int = 2,
    home: str,
    apart: bool = False,
    **options: Any,
) -> Result:
    os.environ["LIGHTNING_DPO_CACHE"] = home
    loaded: list[str] = []

    def counting(source: str, **settings: Any) -> Any:
        loaded.append(source)
        return load_model(source, **settings)

    builder_module.load_model = counting
    torch.manual_seed(0)
    rank = os.environ.get("RANK", "0")
    module = DPOModule(
        tiny_model() if policy is None else policy,
        reference=reference,
        reference_cache=f"{cache}{rank if apart else ''}",
        optimizer=lambda params: AdamW(params, lr=1e-2),
        startup_check=not reference.startswith("cached:"),
    )
    losses = Losses()
    run = trainer(
        devices=1 if strategy == "auto" else 2,
        strategy=FSDP2Strategy() if strategy == "fsdp2" else strategy,
        callbacks=[losses],
        max_epochs=epochs,
        **options,
    )
    try:
        run.fit(module, loader(random_pairs(count)[::every], batch_size=batch_size))
    finally:
        builder_module.load_model = load_model
    usage = [c.usage for c in run.callbacks if isinstance(c, FillReferenceCache)]
    return Result(usage[0] if usage else None, losses.values, loaded, module.reference_model is not None)


def use_cache(model: str, cache: str, *, count: int) -> CacheUsage:
    """Look up some pairs in a cache, which is filled with what it lacks; nothing is trained."""
    module = DPOModule(model, reference="cached", reference_cache=cache, optimizer=sgd)
    run = trainer(max_epochs=0)
    run.fit(module, loader(random_pairs(count)))
    return used_by(run)


def used_by(run: pl.Trainer) -> CacheUsage:
    """What a run took from the reference cache."""
    (usage,) = [c.usage for c in run.callbacks if isinstance(c, FillReferenceCache)]
    assert usage is not None
    return usage


def fill_slowly(told: Connection, *, model: str, cache: str, pause: float, count: int, step: int) -> None:
    """Fill a cache with each `step`-th of some pairs, telling of each pass; for a process of its own."""
    store.FLUSH_SECONDS, store.FLUSH_SHARE = 0.0, 1e9  # a shard after every pass
    compute = CachedReference.compute

    def slowly(self: Any, *args: Any, **options: Any) -> None:
        compute(self, *args, **options)
        told.send("pass")
        time.sleep(pause)

    CachedReference.compute = slowly  # type: ignore[method-assign]
    module = DPOModule(model, reference="cached", reference_cache=cache, optimizer=sgd)
    run = trainer(max_epochs=0, num_sanity_val_steps=0)
    run.fit(module, loader(random_pairs(count)[::step], batch_size=4))
    told.send(str(next(c.usage for c in run.callbacks if isinstance(c, FillReferenceCache))))
