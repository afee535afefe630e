"""A stream's batches for the trainer: as many as the run takes, from where it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_dpo.data.bad_rows import BadRowHandling, RowReport
from lightning_dpo.data.streaming.rows import RowStream, StreamedBatch
from lightning_dpo.types import PairBatch

__all__ = ["StreamLoader"]

_JUDGED_FROM = 200
"""Rows from which the share of bad ones is held against what is allowed."""


class _Reader(IterableDataset[StreamedBatch]):
    """What one worker of one rank reads, from batch `start` of the rank to batch `stop`."""

    def __init__(self, stream: RowStream, *, rank: int, ranks: int, start: int, stop: int) -> None:
        self.stream = stream
        self.rank, self.ranks = rank, ranks
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[StreamedBatch]:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        # Workers take turns, beginning with the first, which reads for the one whose turn it would have been.
        turn = (number + self.start) % workers
        first, stop = (len(range(turn, end, workers)) for end in (self.start, self.stop))
        part = self.rank * workers + turn
        yield from self.stream.batches(part, self.ranks * workers, first=first, stop=stop)


class StreamLoader:
    """Batches of a stream for one rank; as many as a run's steps need, over as many passes as that takes.

    Attributes:
        report: What became of the rows that this rank has read.
        is_stream: That its batches are not known before they are read.
    """

    is_stream = True

    def __init__(
        self,
        stream: RowStream,
        *,
        batches: int,
        accumulate: int,
        handling: BadRowHandling,
        report: RowReport,
        rank: int = 0,
        ranks: int = 1,
        sum_over_ranks: Callable[[float], float] | None = None,
        num_processes: int = 1,
        batches_done: Callable[[], int] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Load a stream's batches.

        Args:
            stream: The rows, and how they become batches.
            batches: Batches of the run on this rank.
            accumulate: Batches of an optimizer step.
            handling: What happens where too many rows are bad.
            report: Where rows are counted.
            rank: Which share of the rows is read, from 0.
            ranks: How many shares there are.
            sum_over_ranks: Adds up a number over the processes, which all call it; None where there is one.
            num_processes: How many processes that adds up.
            batches_done: How many batches to pass over, asked for as the first is.
            num_workers: Processes that tokenise and collate.
            pin_memory: Pin batches for the copy to a GPU.
        """
        self.report = report
        self._stream = stream
        self._batches = batches
        self._accumulate = accumulate
        self._handling = handling
        self._rank, self._ranks = rank, ranks
        self._sum_over_ranks, self._num_processes = sum_over_ranks, num_processes
        self._batches_done = batches_done
        self._num_workers, self._pin_memory = num_workers, pin_memory

    def __len__(self) -> int:
        """Batches of the run."""
        return self._batches

    def __iter__(self) -> Iterator[PairBatch]:
        done = 0 if self._batches_done is None else self._batches_done()
        start = done - done % self._accumulate  # of the window of the next step, for what its pairs count
        reader = _Reader(self._stream, rank=self._rank, ranks=self._ranks, start=start, stop=self._batches)
        batches = iter(
            DataLoader(
                reader,
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
            )
        )
        for first in range(start, self._batches, self._accumulate):
            window = [self._counted(batch) for batch in _next(batches, self._accumulate)]
            # As with data that are tokenised before: the mean over the pairs of a step, wherever they are.
            total = sum(float(batch.weights.sum()) for batch in window)
            if self._sum_over_ranks is not None:
                total = self._sum_over_ranks(total)
            denominator = total / (self._accumulate * self._num_processes) or 1.0
            for number, batch in enumerate(window, first):
                if number >= done:
                    yield replace(batch, denominator=denominator)

    def state_dict(self) -> dict[str, Any]:
        """Save nothing: the seed and the trainer's count of batches say where a run was left.

        A stream's own state, such as `datasets.IterableDataset` has, would be that of the first rank alone.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing, since `state_dict` saves nothing."""

    def _counted(self, streamed: StreamedBatch) -> PairBatch:
        before = set(self.report.counts)
        self.report.merge(streamed.report)
        for reason in set(self.report.counts) - before:
            example = self.report.examples[reason]
            rank_zero_warn(
                f"`train` has rows that are left out, {reason}; the first, {example.place}: {example.detail}"
            )
        if self.report.rows >= _JUDGED_FROM:
            self._handling.apply_to_report(self.report, split="train")
        return streamed.pairs


def _next(batches: Iterator[StreamedBatch], number: int) -> Iterator[StreamedBatch]:
    for _ in range(number):
        yield next(batches)


def _unchanged(batch: Any) -> Any:
    return batch
