"""One pass of the reference over the trainer's data, before training, for what the cache does not have."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_dpo.reference.cache.store import ReferenceCache
from lightning_dpo.reference.cache.usage import CacheUsage, distinct
from lightning_dpo.reference.cached import CachedReference
from lightning_dpo.reference.missing import missing_batches, trainer_completions
from lightning_dpo.scoring.forward import ScoringPlan
from lightning_dpo.types import CompletionBatch

__all__ = ["FillReferenceCache", "fill_cache", "gather_usage"]

_REPORT_SECONDS = 30.0


class ScoredModule(Protocol):
    """What is asked of a module whose reference may be cached."""

    def plan(self) -> ScoringPlan:
        """How its policy is scored."""

    def reference_completions(self, batch: Any) -> CompletionBatch:
        """The completions of a batch that the reference is asked for."""


class FillReferenceCache(pl.Callback):
    """Computes missing reference log-probabilities before training, and says at the end what was used.

    Attributes:
        usage: What the last run took from the cache, on all ranks.
    """

    def __init__(self) -> None:
        self.usage: CacheUsage | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look whether the policy is what it was, before the strategy writes to it."""
        for reference in _reference_of(pl_module):
            reference.check_policy()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fill the cache for training and validation data.

        Raises:
            ValueError: If the cache cannot be written, or the reference's weights are gone.
        """
        fill_cache(pl_module, trainer=trainer)  # type: ignore[arg-type]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on the policy changes."""
        for reference in _reference_of(pl_module):
            reference.policy_changes()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was taken from the cache."""
        self._finish(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fill the cache for validation data, where there is no training."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            fill_cache(pl_module, trainer=trainer)  # type: ignore[arg-type]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was taken from the cache, where there is no training."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._finish(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Keep what was computed."""
        for reference in _reference_of(pl_module):
            if reference.is_open:
                reference.save()

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for reference in _reference_of(pl_module):
            reference.save()
            reference.release()
            self.usage = gather_usage(reference, world_size=trainer.world_size)
            rank_zero_info(str(self.usage))


def fill_cache(module: ScoredModule, *, trainer: pl.Trainer) -> None:
    """Compute what the cache lacks of the trainer's data; every rank computes its own share.

    Random states and data loaders are left as they were; so is a module whose reference is not cached.

    Args:
        module: The module that is about to run, its policy on its device.
        trainer: The trainer, in `on_fit_start` or `on_validation_start`.

    Raises:
        ValueError: If the cache cannot be written, or the reference's weights are gone.
    """
    for reference in _reference_of(module):
        with trainer.precision_plugin.forward_context():
            cache = reference.open(device=trainer.strategy.root_device)
            # All ranks go by one list of shards: ranks that share their data must agree on what is missing.
            names = trainer.strategy.broadcast(_names(cache))
            try:
                if trainer.local_rank == 0:
                    cache.load(names)
            finally:
                trainer.strategy.barrier("the index of the reference cache")
            if trainer.local_rank:
                cache.load(names, is_first=False)
            work = _Pass(module, reference, trainer)
            try:
                batches = trainer_completions(
                    trainer,
                    needs_all=reference.needs_all,
                    completions_of=module.reference_completions,
                    reference=reference,
                )
                work.run(missing_batches(batches, reference))
            finally:
                reference.release()
                reference.policy_is_set_up()
        if trainer.world_size > 1:
            _take_over(cache, trainer)


def gather_usage(reference: CachedReference, *, world_size: int) -> CacheUsage:
    """What all ranks together took from the cache; all of them must call this."""
    cache = reference.cache
    mine = (*reference.usage.counted(), reference.passes, tuple(cache.damaged))
    parts: list[Any] = [mine]
    if world_size > 1:
        parts = [None] * world_size
        torch.distributed.all_gather_object(parts, mine)
    keys, fresh, passes, damaged = zip(*parts, strict=True)
    asked, computed = distinct(np.concatenate(keys), np.concatenate(fresh))
    return CacheUsage(
        passes=sum(passes),
        pairs=len(asked),
        from_cache=int((~computed).sum()),
        damaged=len(set().union(*damaged)),
    )


class _Pass:
    """Forward passes that all ranks make in step, for a sharded model runs on all of them or on none."""

    def __init__(self, module: ScoredModule, reference: CachedReference, trainer: pl.Trainer) -> None:
        self._module = module
        self._reference = reference
        self._strategy = trainer.strategy
        self._prompts = 0
        self._began = self._reported = time.monotonic()

    def run(self, batches: Iterator[CompletionBatch]) -> None:
        """Compute batches and write what comes out.

        Raises:
            ValueError: On every rank, if one cannot compute or write.
        """
        error: Exception | None = None
        batch = next(batches, None)
        while self._any_rank(batch is not None):
            try:
                self._step(batch)
            except (OSError, ValueError) as caught:
                error = caught
            if self._any_rank(error is not None):
                raise self._explained(error) from error
            batch = next(batches, None)
        try:
            self._reference.cache.flush()
        except OSError as caught:
            error = caught
        if self._any_rank(error is not None):
            raise self._explained(error) from error
        if self._prompts:
            self._say("computed")

    def _step(self, batch: CompletionBatch | None) -> None:
        plan = self._module.plan()
        if batch is not None:
            self._reference.compute(batch, plan=plan)
            self._prompts += len(batch.prompt_lengths)
            if self._reference.cache.is_flush_due:
                self._reference.cache.flush()
        elif self._reference.is_sharded:
            self._reference.keep_in_step(plan=plan)
        if time.monotonic() - self._reported > _REPORT_SECONDS:
            self._reported = time.monotonic()
            self._say("computing")

    def _any_rank(self, here: bool) -> bool:  # noqa: FBT001
        return bool(self._strategy.reduce_boolean_decision(here, all=False))

    def _say(self, doing: str) -> None:
        rank_zero_info(
            f"{doing} reference log-probabilities: {self._prompts} pairs on this rank in "
            f"{time.monotonic() - self._began:.0f} s, kept in {self._reference.cache.location}"
        )

    def _explained(self, error: Exception | None) -> Exception:
        if isinstance(error, OSError):
            cache = self._reference.cache
            return ValueError(
                f"`reference_cache` must be writable with room to spare, got {cache.location}: {error}. "
                f"{len(cache) - cache.waiting} log-probabilities are in it and stay; make room or name "
                "another folder, and the pass goes on from there"
            )
        return error or ValueError(
            "another rank could not compute reference log-probabilities; see its error"
        )


def _take_over(cache: ReferenceCache, trainer: pl.Trainer) -> None:
    """Read what the other ranks wrote: from the next epoch on, their pairs may come here.

    Raises:
        ValueError: On every rank, if one cannot see what another wrote.
    """
    names = trainer.strategy.broadcast(cache.names())
    cache.load(names, fresh=True)
    apart = not cache.loaded <= set(names) or not set(names) <= cache.loaded | set(cache.damaged)
    if trainer.strategy.reduce_boolean_decision(apart, all=False):
        raise ValueError(
            f"`reference_cache` must be a folder that all processes see, or a URL, got {cache.location}, "
            "in which one does not find what another wrote; name a folder on a shared file system"
        )


def _reference_of(module: Any) -> list[CachedReference]:
    """The module's reference if it is cached, or nothing."""
    reference = getattr(module, "reference", None)
    return [reference] if isinstance(reference, CachedReference) else []


def _names(cache: ReferenceCache) -> list[str]:
    """The shards that are there, the first that is asked of a cache."""
    try:
        return cache.names()
    except OSError as error:
        raise ValueError(
            f"`reference_cache` must be a place that can be read, got {cache.location}: {error}. Check the "
            "permissions or, for a URL, the credentials and the connection"
        ) from error
