"""What a pass of the reference has to compute: the trainer's data, less what is in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_dpo.data.loader import PairLoader, TokenDataset
from lightning_dpo.reference.cache.keys import batch_keys
from lightning_dpo.reference.cached import CachedReference, missing_prompts
from lightning_dpo.types import CompletionBatch

__all__ = [
    "HasCompletions",
    "missing_batches",
    "of_all_completions",
    "trainer_batches",
    "trainer_completions",
]

_MARK = "gives_all_completions"

KnownRows: TypeAlias = Callable[[Any, npt.NDArray[np.int64]], npt.NDArray[np.bool_] | None]
_Function = TypeVar("_Function", bound=Callable[..., CompletionBatch])


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
    reference: CachedReference | None = None,
) -> Iterator[CompletionBatch]:
    """The prompts and completions that a run is about to take on this rank, training data first.

    Args:
        trainer: The trainer as its run begins.
        needs_all: See `trainer_batches`.
        completions_of: What the reference is asked for of a batch.
        reference: Leave out batches of which it has everything, by the keys that lie beside the tokens:
            nothing is read of them, collated or hashed. Without, and where `completions_of` is not marked by
            `of_all_completions`, all batches are given.

    Raises:
        ValueError: If a loader yields batches that have no completions.
    """
    known: KnownRows | None = None
    if reference is not None and getattr(completions_of, _MARK, False):
        known = partial(_known_rows, reference=reference, is_first=trainer.local_rank == 0)
    for batch in trainer_batches(trainer, needs_all=needs_all, known=known):
        if not isinstance(batch, HasCompletions):
            raise ValueError(
                f'`reference="cached"` needs data loaders that yield PairBatch, got '
                f"{type(batch).__name__}; collate with PairBatch.from_pairs"
            )
        yield completions_of(batch)


def of_all_completions(function: _Function) -> _Function:
    """Mark a `reference_completions` that gives ``batch.completions()``, whose keys lie beside the tokens."""
    setattr(function, _MARK, True)
    return function


def trainer_batches(trainer: pl.Trainer, *, needs_all: bool, known: KnownRows | None = None) -> Iterator[Any]:
    """The batches that a run is about to take on this rank, training data first.

    Loaders without a length are left out, for they may have no end, and streams, whose rows are looked up as
    they come. Random states are left as they were.

    Args:
        trainer: The trainer as its run begins.
        needs_all: Whether to take whole loaders where the trainer is limited to a part of them. A part is
            enough where it is certain to be the part that is used.
        known: Says of some rows of a data set which need not be looked at, or None if it cannot; batches of
            which that is all rows are left out.
    """
    for loader, limit, is_all in _loaders(trainer, needs_all=needs_all):
        if getattr(loader, "is_stream", False):
            if needs_all:
                raise ValueError(
                    '`reference="cached"` does not go with streamed training data here: the reference cannot '
                    "be run in the middle of training (its policy is sharded, or was given as a module), and "
                    'a stream is not known before. Use reference="frozen", or "adapter" with `lora`, or set '
                    "`streaming: false`"
                )
            continue
        if math.isinf(limit):
            continue
        whole = needs_all and not isinstance(loader, PairLoader) and sized_len(loader) is not None
        with isolate_rng():
            yield from _batches(loader, None if whole else int(limit), is_all=is_all, known=known)


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


def _batches(
    loader: Any, limit: int | None, *, is_all: bool = False, known: KnownRows | None = None
) -> Iterator[Any]:
    if not isinstance(loader, PairLoader):
        yield from islice(loader, limit)
        return
    # By its sampler, from the beginning: the loader itself would pass over what was trained on already.
    sampler = loader.pair_sampler
    if is_all and sampler.is_mixed:
        sampler, limit = sampler.unmixed(), None
    rows, offsets = sampler.layout(limit)
    steps = np.arange(len(offsets) - 1)
    done = None if known is None or not len(rows) else known(loader.dataset, rows)
    if done is not None:
        steps = steps[~np.logical_and.reduceat(done, offsets[:-1])]
    for step in steps:
        yield loader.dataset[sampler.batch_at(int(step))]


def _known_rows(
    rows: Any, indices: npt.NDArray[np.int64], *, reference: CachedReference, is_first: bool
) -> npt.NDArray[np.bool_] | None:
    """Which rows of a data set the cache has everything of; None where there are no keys to tell by."""
    if not isinstance(rows, TokenDataset):
        return None
    if not rows.store.has_keys:
        # Tokens that an older version left. To hash all rows pays only where most are taken.
        if not is_first or 2 * len(indices) < len(rows.store):
            return None
        try:
            rows.store.write_keys()
        except OSError:
            return None
    keys = rows.keys_of(indices)
    return None if keys is None else reference.look_up_rows(keys)


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
