"""Tokenised pairs and a sampler -> a data loader of PairBatch that can go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset

from lightning_dpo.data.sampler import BatchIndices, PairBatchSampler
from lightning_dpo.data.token_store import TokenStore
from lightning_dpo.types import PairBatch, TokenPair

__all__ = ["PairDataset", "PairLoader"]

_Number = TypeVar("_Number", np.int64, np.float32)


class PairDataset(Dataset[PairBatch]):
    """Tokenised pairs, batch by batch: a worker of the loader turns a `BatchIndices` into a `PairBatch`.

    Attributes:
        store: The tokenised pairs.
        indices: Which of them, (pairs,); all if None.
    """

    def __init__(self, store: TokenStore, *, indices: npt.NDArray[np.int64] | None = None) -> None:
        """Take a part of a store, or all of it."""
        self.store = store
        self.indices = indices

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.store) if self.indices is None else len(self.indices)

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
        )

    def pair(self, index: int) -> TokenPair:
        """One pair, by its number in this data set; its ids are arrays."""
        pair = self.store[index if self.indices is None else int(self.indices[index])]
        return TokenPair(*(np.asarray(part, dtype=np.int64) for part in pair))  # type: ignore[arg-type]

    def row(self, index: int) -> int:
        """The number of a pair's row in the source, from 0."""
        return self.store.row(index if self.indices is None else int(self.indices[index]))

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each pair, prompt and both completions, (pairs,)."""
        store = self.store
        lengths = store.prompt_lengths.astype(np.int64) + store.chosen_lengths + store.rejected_lengths
        return self._of(lengths)

    def weights(self) -> npt.NDArray[np.float32] | None:
        """What each pair counts, (pairs,); None where the data do not say, so that all count 1."""
        return None if self.store.weights is None else self._of(self.store.weights)

    def _of(self, values: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
        """Those of the store's values that are of this data set's pairs."""
        return values if self.indices is None else values[self.indices]


class PairLoader(DataLoader[PairBatch]):
    """A data loader of the batches that a sampler has decided on.

    It turns to the sampler when the first batch is asked for, not when the iterator is made: Lightning makes
    the iterator before it says which epoch it is, and before it restores a checkpoint.

    Attributes:
        pair_sampler: What decides the batches.
    """

    def __init__(
        self,
        pairs: PairDataset,
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

    def __iter__(self) -> Iterator[PairBatch]:  # type: ignore[override]
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


def _unchanged(batch: Any) -> Any:
    return batch
