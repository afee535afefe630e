"""Tokenised rows and a sampler -> a data loader of batches that can go on in the middle of an epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, Dataset

from lightning_dpo.data.mixture import JoinedStore
from lightning_dpo.data.sampler import BatchIndices, PairBatchSampler
from lightning_dpo.data.token_store import TokenStore
from lightning_dpo.types import FeedbackBatch, PairBatch, TokenExample, TokenPair
from lightning_dpo.types.completion_keys import KeyArray

__all__ = [
    "FeedbackDataset",
    "PairDataset",
    "PairLoader",
    "SplitPairDataset",
    "TokenDataset",
    "accumulation",
    "batches_done",
]


class TokenDataset(Dataset[Any], ABC):
    """Tokenised rows, batch by batch: a worker of the loader turns a `BatchIndices` into a batch.

    Attributes:
        store: The tokenised rows, of one data set or of several.
        indices: Which of them, (rows,); all if None.
    """

    def __init__(
        self, store: TokenStore | JoinedStore, *, indices: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Take a part of a store, or all of it."""
        self.store = store
        self.indices = indices

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.store) if self.indices is None else len(self.indices)

    @abstractmethod
    def __getitem__(self, batch: BatchIndices) -> PairBatch | FeedbackBatch:
        """Collate a batch."""

    def row(self, index: int) -> int:
        """The number in the source, from 0, of a row of this data set."""
        return self.store.row(index if self.indices is None else int(self.indices[index]))

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, its prompt and all its completions, (rows,)."""
        lengths: npt.NDArray[np.int64] = np.sum(self.store.part_lengths, axis=0, dtype=np.int64)
        return self._of_mine(lengths)

    def longest(self) -> int:
        """Tokens of the longest prompt with one of its completions; 0 without rows."""
        prompts, *completions = (self._of_mine(part) for part in self.store.part_lengths)
        return int(np.max(prompts + np.max(completions, axis=0), initial=0))

    def weights(self) -> npt.NDArray[np.float32] | None:
        """What each row counts, (rows,); None where the data do not say, so that all count 1."""
        return None if self.store.weights is None else self._of_mine(self.store.weights)

    def origins(self) -> npt.NDArray[np.int64] | None:
        """Number of the named data set that each row is from, (rows,); None where there is one, unnamed."""
        return self._of_mine(self.store.origins) if isinstance(self.store, JoinedStore) else None

    def counted(self, index: int) -> tuple[Any, ...] | None:
        """For each completion of a row whether each of its tokens is trained on; None where all are."""
        return self.store.counted(index if self.indices is None else int(self.indices[index]))

    def origin(self, index: int) -> int:
        """Number of the data set of several that a row is from."""
        assert isinstance(self.store, JoinedStore)
        return int(self.store.origins[index if self.indices is None else self.indices[index]])

    def keys_of(self, indices: npt.NDArray[np.int64]) -> KeyArray | None:
        """Keys of the completions of some rows of this data set, as a batch of them has.

        Args:
            indices: Their numbers in this data set, (rows,).

        Returns:
            Those of each row's completions, then those of their first parts where a batch has these,
            (rows, keys of a row, 2); None where they are not kept beside the tokens.
        """
        return self.store.keys_of(indices if self.indices is None else self.indices[indices])

    def _origins_of(self, batch: BatchIndices) -> list[int] | None:
        if not isinstance(self.store, JoinedStore):
            return None
        return [self.origin(int(index)) for index in batch.indices]

    def _arrays(self, index: int) -> Any:
        """A row, its ids as arrays."""
        row: Any = self.store[index if self.indices is None else int(self.indices[index])]
        return type(row)(*(p if isinstance(p, bool) else np.asarray(p, dtype=np.int64) for p in row))

    def _of_mine(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values if self.indices is None else values[self.indices]


class PairDataset(TokenDataset):
    """Tokenised pairs as batches of pairs."""

    def __getitem__(self, batch: BatchIndices) -> PairBatch:
        """Collate the pairs of a batch."""
        pairs = [self.pair(int(index)) for index in batch.indices]
        places = batch.indices if self.indices is None else self.indices[batch.indices]
        margins = self.store.margins
        return PairBatch.from_pairs(
            pairs,
            weights=batch.weights.tolist(),
            denominator=batch.denominator,
            margins=None if margins is None else margins[places].tolist(),
            origins=self._origins_of(batch),
            counted=[self.counted(int(index)) or (None, None) for index in batch.indices],
        )

    def pair(self, index: int) -> TokenPair:
        """One pair, by its number in this data set; its ids are arrays."""
        pair: TokenPair = self._arrays(index)
        return pair


class FeedbackDataset(TokenDataset):
    """Tokenised examples as batches of feedback."""

    def __getitem__(self, batch: BatchIndices) -> FeedbackBatch:
        """Collate the examples of a batch."""
        examples = [self.example(int(index)) for index in batch.indices]
        return FeedbackBatch.from_examples(
            examples,
            weights=batch.weights.tolist(),
            denominator=batch.denominator,
            origins=self._origins_of(batch),
            counted=[(self.counted(int(index)) or (None,))[0] for index in batch.indices],
        )

    def example(self, index: int) -> TokenExample:
        """One example, by its number in this data set; its ids are arrays."""
        example: TokenExample = self._arrays(index)
        return example

    def labels(self) -> npt.NDArray[np.bool_]:
        """Whether each example is desirable, (examples,)."""
        return np.zeros(0, dtype=np.bool_) if self.store.labels is None else self._of_mine(self.store.labels)


class SplitPairDataset(FeedbackDataset):
    """Tokenised pairs, each as two examples: its chosen completion, desirable, then its rejected one.

    Attributes:
        indices: Which pairs, (pairs,); all if None.
    """

    def __len__(self) -> int:
        """Number of examples, two for each pair."""
        return 2 * super().__len__()

    def example(self, index: int) -> TokenExample:
        """One example, by its number in this data set; its ids are arrays."""
        pair: TokenPair = self._arrays(index // 2)
        is_chosen = index % 2 == 0
        return TokenExample(pair.prompt_ids, pair.chosen_ids if is_chosen else pair.rejected_ids, is_chosen)

    def keys_of(self, indices: npt.NDArray[np.int64]) -> KeyArray | None:
        """Key of the completion of each of some examples, (examples, 1, 2); None where they are not kept."""
        keys = super().keys_of(indices // 2)
        return None if keys is None else keys[np.arange(len(indices)), indices % 2][:, None]

    def counted(self, index: int) -> tuple[Any, ...] | None:
        """Whether each token of an example's completion is trained on; None where all are."""
        masks = super().counted(index // 2)
        return None if masks is None else (masks[index % 2],)

    def row(self, index: int) -> int:
        """The number in the source, from 0, of the pair that an example is from."""
        return super().row(index // 2)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, its prompt and its completion, (examples,)."""
        prompts, chosen, rejected = (self._of_mine(part) for part in self.store.part_lengths)
        return np.stack([prompts + chosen, prompts + rejected], axis=1).ravel().astype(np.int64)

    def weights(self) -> npt.NDArray[np.float32] | None:
        """What each example counts, as its pair does, (examples,); None where all count 1."""
        weights = super().weights()
        return None if weights is None else np.repeat(weights, 2)

    def origin(self, index: int) -> int:
        """Number of the data set of several that an example's pair is from."""
        return super().origin(index // 2)

    def origins(self) -> npt.NDArray[np.int64] | None:
        """Number of the named data set that each example is from, (examples,)."""
        origins = super().origins()
        return None if origins is None else np.repeat(origins, 2)

    def labels(self) -> npt.NDArray[np.bool_]:
        """Whether each example is desirable, (examples,)."""
        return np.tile(np.array([True, False]), len(self) // 2)


class PairLoader(DataLoader[Any]):
    """A data loader of the batches that a sampler has decided on.

    It turns to the sampler when the first batch is asked for, not when the iterator is made: Lightning makes
    the iterator before it says which epoch it is, and before it restores a checkpoint.

    Attributes:
        pair_sampler: What decides the batches.
    """

    def __init__(
        self,
        pairs: TokenDataset,
        *,
        pair_sampler: PairBatchSampler,
        batches_done: Callable[[], int] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Load a sampler's batches.

        Args:
            pairs: What the sampler's indices refer to.
            pair_sampler: What decides the batches.
            batches_done: How many batches of the epoch to pass over, asked for as an epoch begins.
            num_workers: Processes that collate batches.
            pin_memory: Pin batches for the copy to a GPU.
        """
        super().__init__(
            pairs,
            sampler=pair_sampler,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
        )
        self.pair_sampler = pair_sampler
        self._batches_done = batches_done

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.pair_sampler.start = 0 if self._batches_done is None else self._batches_done()
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Save nothing: the seed, the epoch and the trainer's count of batches say where an epoch was left.

        That there is such a method tells Lightning that the loader can go on from there. A loader's own
        count, such as that of torchdata's StatefulDataLoader, would not do: it has passed the batch in which
        an error stopped a run, it is gone once the run has ended, it holds for one number of workers, and
        Lightning does not restore it where a schedule has asked for the number of steps.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing, since `state_dict` saves nothing."""


def accumulation(trainer: pl.Trainer) -> int | dict[int, int]:
    """Batches that a trainer accumulates for a step, by epoch where a callback schedules them."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.scheduling
    return trainer.accumulate_grad_batches


def batches_done(trainer: pl.Trainer) -> int:
    """Batches of this epoch that were trained on before the checkpoint that is being resumed from."""
    # The outer loop's flag, since the inner one's is gone where the checkpoint was made at a validation: then
    # Lightning passes over that validation before it asks for a batch.
    loop = trainer.fit_loop
    return loop.epoch_loop.batch_progress.current.ready if loop.restarting else 0


def _unchanged(batch: Any) -> Any:
    return batch
