"""What a pass of the reference has to compute: the trainer's data, less what is in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_dpo.data.loader import PairLoader
from lightning_dpo.reference.cache.keys import batch_keys
from lightning_dpo.reference.cached import CachedReference, missing_prompts
from lightning_dpo.types import CompletionBatch

__all__ = ["HasCompletions", "missing_batches", "trainer_batches", "trainer_completions"]


@runtime_checkable
class HasCompletions(Protocol):
    """A batch of any kind of feedback whose prompts and completions can be scored."""

    def completions(self) -> CompletionBatch:
        """The prompts with their completions."""


def missing_batches(
    batches: Iterable[CompletionBatch], reference: CachedReference
) -> Iterator[CompletionBatch]:
    """Gather what the cache lacks, each prompt with its completions once, into batches that fit.

    None is larger than those that the prompts came in.

    Args:
        batches: The data, on the CPU.
        reference: Where to look; what it has is counted as asked for.
    """
    asked: set[bytes] = set()
    waiting: list[CompletionBatch] = []
    most = budget = 0
    for batch in batches:
        sizes = _sizes(batch)
        most, budget = max(most, len(sizes)), max(budget, len(sizes) * max(sizes))
        for prompt in missing_prompts(batch, reference.look_up(batch)):
            one = batch.select(prompt[None])
            name = batch_keys(one)[0].tobytes()
            if name not in asked:
                asked.add(name)
                waiting.append(one)
        while (count := _fitting(waiting, most, budget)) is not None:
            yield CompletionBatch.join(waiting[:count])
            del waiting[:count]
    while waiting:
        count = _fitting(waiting, most, budget) or len(waiting)
        yield CompletionBatch.join(waiting[:count])
        del waiting[:count]


def trainer_completions(
    trainer: pl.Trainer,
    *,
    needs_all: bool,
    completions_of: Callable[[Any], CompletionBatch] = HasCompletions.completions,
) -> Iterator[CompletionBatch]:
    """The prompts and completions that a run is about to take on this rank, training data first.

    Args:
        trainer: The trainer as its run begins.
        needs_all: See `trainer_batches`.
        completions_of: What the reference is asked for of a batch.

    Raises:
        ValueError: If a loader yields batches that have no completions.
    """
    for batch in trainer_batches(trainer, needs_all=needs_all):
        if not isinstance(batch, HasCompletions):
            raise ValueError(
                f'`reference="cached"` needs data loaders that yield PairBatch, got '
                f"{type(batch).__name__}; collate with PairBatch.from_pairs"
            )
        yield completions_of(batch)


def trainer_batches(trainer: pl.Trainer, *, needs_all: bool) -> Iterator[Any]:
    """The batches that a run is about to take on this rank, training data first.

    Loaders without a length are left out, for they may have no end. Random states are left as they were.

    Args:
        trainer: The trainer as its run begins.
        needs_all: Whether to take whole loaders where the trainer is limited to a part of them. A part is
            enough where it is certain to be the part that is used.
    """
    for loader, limit, is_all in _loaders(trainer, needs_all=needs_all):
        if math.isinf(limit):
            continue
        whole = needs_all and not isinstance(loader, PairLoader) and sized_len(loader) is not None
        with isolate_rng():
            yield from _batches(loader, None if whole else int(limit), is_all=is_all)


def _loaders(trainer: pl.Trainer, *, needs_all: bool) -> Iterator[tuple[Any, float, bool]]:
    """Data loaders as the trainer uses them, divided over ranks, and how many batches it takes of each.

    The third of each says whether more than one epoch takes them, which may draw other pairs.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        loop = trainer.validate_loop
        for loader, batches in zip(_flat(trainer.val_dataloaders), loop.max_batches, strict=True):
            yield loader, batches, False
        return
    fit_loop = trainer.fit_loop
    was_set_up = fit_loop._combined_loader is not None
    with isolate_rng():
        fit_loop.setup_data()
    if fit_loop._combined_loader is not None:
        limit, is_all = _training_batches(trainer, needs_all=needs_all)
        try:
            for loader in _flat(trainer.train_dataloader):
                yield loader, limit, is_all
        finally:
            if not was_set_up:
                fit_loop._combined_loader = None  # the loop sets it up itself, after a checkpoint is restored
    if trainer.enable_validation:
        loop = fit_loop.epoch_loop.val_loop
        loop.setup_data()
        for loader, batches in zip(_flat(trainer.val_dataloaders), loop.max_batches, strict=True):
            yield loader, batches, False


def _training_batches(trainer: pl.Trainer, *, needs_all: bool) -> tuple[float, bool]:
    """Batches of an epoch that are used; all, and that it is all, where later epochs use others."""
    fit_loop = trainer.fit_loop
    steps = trainer.max_steps * trainer.accumulate_grad_batches if trainer.max_steps > 0 else math.inf
    limit = min(fit_loop.max_batches, steps)
    one_epoch = trainer.max_epochs in (0, 1) or steps <= fit_loop.max_batches
    if needs_all and not one_epoch:
        return max([limit, *(sized_len(loader) or 0 for loader in _flat(trainer.train_dataloader))]), True
    return limit, False


def _batches(loader: Any, limit: int | None, *, is_all: bool = False) -> Iterator[Any]:
    if not isinstance(loader, PairLoader):
        yield from islice(loader, limit)
        return
    # By its sampler, from the beginning: the loader itself would pass over what was trained on already.
    sampler, start = loader.pair_sampler, loader.pair_sampler.start
    if is_all and sampler.is_mixed:
        sampler, start, limit = sampler.unmixed(), 0, None
    sampler.start = 0
    batches = iter(sampler)
    sampler.start = start
    for indices in islice(batches, limit):
        yield loader.dataset[indices]


def _flat(loaders: Any) -> list[Any]:
    return [] if loaders is None else list(CombinedLoader(loaders, "sequential").flattened)


def _sizes(batch: CompletionBatch) -> list[int]:
    """Tokens of each prompt with its completions."""
    sizes = batch.prompt_lengths.index_add(0, batch.prompt_of, batch.completion_lengths)
    tokens: list[int] = sizes.tolist()
    return tokens


def _fitting(items: list[CompletionBatch], most: int, budget: int) -> int | None:
    """How many of the first items, of one prompt each, fill a batch, or None if they do not."""
    longest = 0
    for count, item in enumerate(items):
        longest = max(longest, _sizes(item)[0])
        if count and (count >= most or (count + 1) * longest > budget):
            return count
    return most if len(items) == most else None
