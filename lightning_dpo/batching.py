"""Which pairs make up each batch, on every rank: decided ahead, from the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import SequentialSampler
from torch.utils.data.distributed import DistributedSampler

__all__ = ["BatchPlan", "BatchRecord", "OrderedBatchPlan"]

_Ints = npt.NDArray[np.int64]


class BatchRecord(NamedTuple):
    """One batch of one rank.

    Attributes:
        indices: The pairs, (batch,).
        weights: 1 for each pair, or 0 where it only fills the batch of a rank that has none left, (batch,).
        denominator: What the sum of the pairs' losses is divided by, so that accumulating and averaging
            batches of any sizes, over steps and ranks, gives the mean over their pairs.
    """

    indices: _Ints
    weights: npt.NDArray[np.float32]
    denominator: float


class BatchPlan(DistributedSampler[BatchRecord]):
    """The batches of one rank, epoch by epoch; every pair is in exactly one batch of an epoch.

    Batches have `batch_size` pairs, or as many pairs of like length as `tokens_per_batch` holds. Their number
    is the same in every epoch and on every rank. It is a DistributedSampler so that Lightning leaves it
    alone: it divides the batches among the ranks itself.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        *,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int | Mapping[int, int] = 1,
    ) -> None:
        """Plan batches.

        Args:
            lengths: Tokens of each pair, prompt and both completions, (pairs,).
            batch_size: Pairs of a batch; with `tokens_per_batch`, at most so many.
            tokens_per_batch: Tokens of a batch, padding to its longest pair included. A pair that is longer
                has a batch of its own.
            shuffle: Whether to change the order, and which pairs meet, from epoch to epoch.
            seed: Decides, with the epoch, what the shuffling gives.
            rank: This process, from 0.
            world_size: How many processes share the data.
            accumulate: Batches accumulated for an optimizer step; or a mapping from the first epoch of a
                number to the number.

        Raises:
            ValueError: If there are no pairs, or neither limit or a senseless one is given.
        """
        self._lengths = np.asarray(lengths, dtype=np.int64)
        for name, value in (("batch_size", batch_size), ("tokens_per_batch", tokens_per_batch)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if batch_size is None and tokens_per_batch is None:
            raise ValueError("`batch_size` or `tokens_per_batch` must be given, got neither")
        if not len(self._lengths):
            raise ValueError("`lengths` must hold at least one pair, got none")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be from 0 to `world_size` - 1, got {rank} of {world_size}")
        self.batch_size = batch_size
        self.tokens_per_batch = tokens_per_batch
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.num_replicas = world_size
        self._accumulate = {0: accumulate} if isinstance(accumulate, int) else dict(accumulate)
        self._limit: int | float = 1.0
        self._filler = np.array([int(self._lengths.argmin())])
        self._buckets = self._make_buckets()
        self.epoch = 0
        self.start = 0
        self._offsets: _Ints = np.zeros(0, dtype=np.int64)
        self._order: _Ints = np.zeros(0, dtype=np.int64)
        self._steps: _Ints = np.zeros((0, world_size), dtype=np.int64)
        self._arrange()

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; Lightning calls this."""
        if epoch != self.epoch:
            self.start = 0
        self.epoch = epoch
        self._arrange()

    def limit(self, batches: int | float) -> None:
        """Count on so many batches of an epoch being used, or such a share, as `limit_train_batches` says.

        The last accumulation window then ends there.
        """
        self._limit = batches

    def __len__(self) -> int:
        """Batches of an epoch on each rank."""
        return len(self._steps)

    def __iter__(self) -> Iterator[BatchRecord]:
        for step in range(self.start, len(self)):
            yield self.record(step)

    def record(self, step: int) -> BatchRecord:
        """The batch of this rank at a step of the epoch."""
        batch = int(self._steps[step, self.rank])
        indices = self._filler if batch < 0 else self._pairs(batch)
        weights = np.full(len(indices), float(batch >= 0), dtype=np.float32)
        return BatchRecord(indices, weights, self._denominator(step))

    def state_dict(self) -> dict[str, Any]:
        """Where an epoch was left; `next` is the caller's to set, who knows which batches were used."""
        return {"epoch": self.epoch, "next": self.start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration at the batch after those already used."""
        self.set_epoch(int(state["epoch"]))
        self.start = int(state["next"])

    def _denominator(self, step: int) -> float:
        """Pairs of the accumulation window over (batches of the window x ranks).

        Lightning divides each loss by the number of batches it accumulates, also in a last window that is
        incomplete, and gradients are averaged over ranks.
        """
        first_epoch = max((epoch for epoch in self._accumulate if epoch <= self.epoch), default=None)
        window = 1 if first_epoch is None else self._accumulate[first_epoch]
        first = step - step % window
        used = int(self._limit * len(self)) if isinstance(self._limit, float) else self._limit
        last = max(min(len(self), used), step + 1)
        batches = self._steps[first : min(first + window, last)].ravel()
        batches = batches[batches >= 0]
        return float((self._offsets[batches + 1] - self._offsets[batches]).sum()) / (
            window * self.num_replicas
        )

    def _pairs(self, batch: int) -> _Ints:
        return self._order[self._offsets[batch] : self._offsets[batch + 1]]

    def _make_buckets(self) -> list[tuple[int, _Ints]]:
        """Batch size, and the pairs of like length that so many of fit in a batch; from short to long."""
        if self.tokens_per_batch is None:
            assert self.batch_size is not None
            return [(self.batch_size, np.arange(len(self._lengths)))]
        fitting = np.maximum(1, self.tokens_per_batch // np.maximum(1, self._lengths))
        if self.batch_size is not None:
            fitting = np.minimum(fitting, self.batch_size)
        sizes = _size_grid(int(fitting.max()))
        size_of = sizes[np.searchsorted(sizes, fitting, side="right") - 1]
        by_length = np.argsort(self._lengths, kind="stable")
        return [(int(size), by_length[size_of[by_length] == size]) for size in np.unique(size_of)[::-1]]

    def _arrange(self) -> None:
        """Lay out the epoch: the pairs in order, where batches begin, and which rank has which."""
        random = np.random.default_rng((self.seed, self.epoch)) if self.shuffle else None
        carried: _Ints = np.zeros(0, dtype=np.int64)
        order: list[_Ints] = []
        counts: list[int] = []
        for number, (size, pairs) in enumerate(self._buckets):
            # Pairs that fill no batch go on to the next bucket, whose batches have room for them.
            pairs = np.concatenate([carried, random.permutation(pairs) if random is not None else pairs])
            full = len(pairs) // size * size
            if number + 1 < len(self._buckets):
                pairs, carried = pairs[:full], pairs[full:]
            order.append(pairs)
            counts += [size] * (full // size)
        if len(order[-1]) % self._buckets[-1][0]:
            counts.append(len(order[-1]) % self._buckets[-1][0])
        self._order = np.concatenate(order)
        self._offsets = np.cumsum([0, *counts])
        ranks = self.num_replicas
        steps = -np.ones(-(-len(counts) // ranks) * ranks, dtype=np.int64)
        steps[: len(counts)] = np.arange(len(counts))
        # Ranks take neighbouring batches, of like length, so that none waits for another.
        self._steps = steps.reshape(-1, ranks)
        if random is not None and self.tokens_per_batch is not None:
            self._steps = random.permutation(self._steps)


class OrderedBatchPlan(BatchPlan, SequentialSampler):  # type: ignore[misc]
    """A plan without shuffling, recognised by Lightning as such: `overfit_batches` then leaves it alone."""

    def __init__(self, lengths: npt.ArrayLike, **settings: Any) -> None:
        """Plan batches in order; see `BatchPlan`."""
        super().__init__(lengths, shuffle=False, **settings)


def _size_grid(largest: int) -> _Ints:
    """Batch sizes from 1 up, by steps of at most an eighth."""
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + max(1, sizes[-1] // 8))
    return np.array(sizes)
