"""Which examples make up each batch, on every rank: decided ahead, from the seed and the epoch alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_dpo.data.mixture import Mixture
from lightning_dpo.types.checks import check_bounds

__all__ = ["BatchIndices", "OrderedPairBatchSampler", "PairBatchSampler"]

_Ints = npt.NDArray[np.int64]


class BatchIndices(NamedTuple):
    """Which pairs make up one batch of one rank, and what each counts.

    Attributes:
        indices: The pairs, (batch,).
        weights: What each pair counts, (batch,); 0 where it only fills the batch of a rank that has none
            left.
        denominator: What the sum of the pairs' losses is divided by, so that accumulating and averaging
            batches of any sizes, over steps and ranks, gives the weighted mean over their pairs.
    """

    indices: _Ints
    weights: npt.NDArray[np.float32]
    denominator: float


class _Epoch(NamedTuple):
    """The batches of an epoch.

    Attributes:
        number: Which epoch, from 0.
        order: The pairs, batch after batch, (pairs,).
        offsets: Where each batch begins in `order`, and where the last one ends, (batches + 1,).
        steps: Which batch each rank has at each step, -1 where it has none, (steps, ranks).
        totals: What the pairs of each batch count together, (batches,).
    """

    number: int
    order: _Ints
    offsets: _Ints
    steps: _Ints
    totals: npt.NDArray[np.float64]


class PairBatchSampler(DistributedSampler[BatchIndices]):
    """The batches of one rank, epoch by epoch; every pair is in exactly one batch of an epoch.

    Where data sets are mixed, an epoch has each one's share of its pairs instead.

    Batches have `batch_size` pairs, or as many pairs of like length as `tokens_per_batch` holds. Their number
    is the same in every epoch and on every rank. It is a DistributedSampler so that Lightning leaves it
    alone: it divides the batches among the ranks itself.

    Attributes:
        start: The first batch of the next iteration, to go on in the middle of an epoch.
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
        weights: npt.NDArray[np.float32] | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        """Divide pairs into batches.

        Args:
            lengths: Tokens of each pair, or other example: its prompt and all its completions, (pairs,).
            batch_size: Pairs of a batch; with `tokens_per_batch`, at most so many.
            tokens_per_batch: Tokens of a batch, padding to its longest pair included. A pair that is longer
                has a batch of its own.
            shuffle: Whether to change the order, and which pairs meet, from epoch to epoch.
            seed: Decides, with the epoch, what the shuffling gives.
            rank: This process, from 0.
            world_size: How many processes share the data.
            accumulate: Batches accumulated for an optimizer step; or a mapping from the first epoch of a
                number to the number.
            weights: What each pair counts, (pairs,), above 0; None lets all count 1.
            mixture: How often the pairs of each data set come; None has all come once.

        Raises:
            ValueError: If there are no pairs, or neither limit or a senseless one is given.
        """
        self._lengths = np.asarray(lengths, dtype=np.int64)
        check_bounds(least=1, batch_size=batch_size, tokens_per_batch=tokens_per_batch)
        if batch_size is None and tokens_per_batch is None:
            raise ValueError("`batch_size` or `tokens_per_batch` must be given, got neither")
        if not len(self._lengths):
            raise ValueError("`lengths` must hold at least one pair, got none")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be from 0 to `world_size` - 1, got {rank} of {world_size}")
        self._weights = np.ones(len(self._lengths), dtype=np.float32) if weights is None else weights
        if len(self._weights) != len(self._lengths) or not (self._weights > 0).all():
            raise ValueError(
                f"`weights` must have a number above 0 for each of {len(self._lengths)} pairs, got {weights}"
            )
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
        self._mixture = mixture
        self._cells = None if mixture is None else mixture.quotas([pairs for _, pairs in self._buckets])
        self.epoch = 0
        self.start = 0
        self._epoch = self._arrange(0)

    @property
    def is_mixed(self) -> bool:
        """Whether epochs draw from data sets by shares, so that one epoch need not have every pair."""
        return self._mixture is not None

    def unmixed(self) -> PairBatchSampler:
        """A sampler of the same pairs, each of them once in an epoch."""
        other = copy.copy(self)
        other._mixture, other._cells, other.start = None, None, 0
        other.set_epoch(0)
        return other

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; Lightning calls this."""
        self.epoch = epoch
        self._epoch = self._arrange(epoch)

    def limit(self, batches: int | float) -> None:
        """Count on so many batches of an epoch being used, or such a share, as `limit_train_batches` says.

        The last accumulation window then ends there.
        """
        self._limit = batches

    def __len__(self) -> int:
        """Batches of an epoch on each rank."""
        return len(self._epoch.steps)

    def __iter__(self) -> Iterator[BatchIndices]:
        epoch = self._epoch
        return (self._batch(step, epoch) for step in range(self.start, len(self)))

    def batch_at(self, step: int) -> BatchIndices:
        """This rank's batch of a step of the epoch, from 0."""
        return self._batch(step, self._epoch)

    def layout(self, steps: int | None = None) -> tuple[_Ints, _Ints]:
        """All batches of this rank at once, without what their pairs count.

        Args:
            steps: Only so many, from the start of the epoch.

        Returns:
            The pairs, batch after batch, and where each batch begins and the last one ends, (batches + 1,).
        """
        epoch = self._epoch
        batches = epoch.steps[:steps, self.rank]
        is_filler = batches < 0
        first = np.where(is_filler, 0, epoch.offsets[batches])
        sizes = np.where(is_filler, 1, np.diff(epoch.offsets)[batches])
        ends = np.cumsum(sizes)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - ends + sizes, sizes)
        pairs = np.where(np.repeat(is_filler, sizes), self._filler, epoch.order[places])
        return pairs, np.concatenate([[0], ends])

    def _batch(self, step: int, epoch: _Epoch) -> BatchIndices:
        batch = int(epoch.steps[step, self.rank])
        indices = epoch.order[epoch.offsets[batch] : epoch.offsets[batch + 1]] if batch >= 0 else self._filler
        weights = self._weights[indices] * np.float32(batch >= 0)
        return BatchIndices(indices, weights, self._denominator(step, epoch))

    def _denominator(self, step: int, epoch: _Epoch) -> float:
        """What the pairs of the accumulation window count together over (batches of the window x ranks).

        Lightning divides each loss by the number of batches it accumulates, also in a last window that is
        incomplete, and gradients are averaged over ranks.
        """
        changed = max((first for first in self._accumulate if first <= epoch.number), default=None)
        window = 1 if changed is None else self._accumulate[changed]
        start = step - step % window
        used = int(self._limit * len(self)) if isinstance(self._limit, float) else self._limit
        stop = min(start + window, max(min(len(self), used), step + 1))
        batches = epoch.steps[start:stop].ravel()
        batches = batches[batches >= 0]
        return float(epoch.totals[batches].sum()) / (window * self.num_replicas)

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

    def _arrange(self, number: int) -> _Epoch:
        """Lay out an epoch."""
        random = np.random.default_rng((self.seed, number)) if self.shuffle else None
        carried: _Ints = np.zeros(0, dtype=np.int64)
        order: list[_Ints] = []
        counts: list[int] = []
        for bucket, (size, pairs) in enumerate(self._buckets):
            # Pairs that fill no batch go on to the next bucket, whose batches have room for them.
            if self._mixture is not None and self._cells is not None:
                cells = self._cells[bucket]
                pairs = self._mixture.draw(cells, epoch=number, group=bucket, shuffle=self.shuffle)
            pairs = np.concatenate([carried, random.permutation(pairs) if random is not None else pairs])
            full = len(pairs) // size * size
            if bucket + 1 < len(self._buckets):
                pairs, carried = pairs[:full], pairs[full:]
            order.append(pairs)
            counts += [size] * (full // size)
        if len(order[-1]) % self._buckets[-1][0]:
            counts.append(len(order[-1]) % self._buckets[-1][0])
        ranks = self.num_replicas
        batches = np.full(-(-len(counts) // ranks) * ranks, -1, dtype=np.int64)
        batches[: len(counts)] = np.arange(len(counts))
        # Ranks take neighbouring batches, of like length, so that none waits for another.
        steps = batches.reshape(-1, ranks)
        if random is not None and self.tokens_per_batch is not None:
            steps = random.permutation(steps)
        pairs, offsets = np.concatenate(order), np.cumsum([0, *counts])
        totals = np.add.reduceat(self._weights[pairs].astype(np.float64), offsets[:-1])
        return _Epoch(number, pairs, offsets, steps, totals)


class OrderedPairBatchSampler(PairBatchSampler, SequentialSampler):  # type: ignore[misc] # it yields batches, not indices
    """Batches in a fixed order, recognised by Lightning as such: `overfit_batches` then leaves them alone."""

    def __init__(self, lengths: npt.ArrayLike, **settings: Any) -> None:
        """Divide pairs into batches, in order.

        Args:
            lengths: Tokens of each pair, or other example: its prompt and all its completions, (pairs,).
            settings: The other arguments of `PairBatchSampler` but `shuffle`.
        """
        super().__init__(lengths, shuffle=False, **settings)


def _size_grid(largest: int) -> _Ints:
    """Batch sizes from 1 up, by steps of at most an eighth."""
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + max(1, sizes[-1] // 8))
    return np.array(sizes)
