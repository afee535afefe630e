"""A stream of rows -> batches of token ids, those of one reader of several."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple

import numpy as np

from lightning_dpo.data.bad_rows import BadRow, BadRowHandling, RowReport
from lightning_dpo.data.parser import RowParser
from lightning_dpo.data.readers import Record
from lightning_dpo.data.sources import RowSource
from lightning_dpo.data.streaming.source import part_of
from lightning_dpo.data.tokenization import RowTokenizer, Tokenised
from lightning_dpo.types import PairBatch, PreferencePair, TokenPair

__all__ = ["RowStream", "StreamedBatch"]

_AT_ONCE = 32
"""Rows that are tokenised at a time, if so many are wanted."""

_Row = tuple[str, Record]


class StreamedBatch(NamedTuple):
    """A batch, and what became of the rows that were read for it.

    Attributes:
        pairs: The batch; a filler of weight 0 where none of its rows can be used.
        report: Counts of its rows.
    """

    pairs: PairBatch
    report: RowReport


class _Pair(NamedTuple):
    ids: TokenPair
    is_truncated: bool
    counted: tuple[list[bool] | None, list[bool] | None]
    margin: float | None
    weight: float

    @classmethod
    def of(cls, row: PreferencePair, tokens: Tokenised) -> _Pair:
        assert isinstance(tokens.pair, TokenPair)
        chosen, rejected = tokens.counted
        weight = 1.0 if row.weight is None else row.weight
        return cls(tokens.pair, tokens.truncated, (chosen, rejected), row.margin, weight)

    @property
    def size(self) -> int:
        return sum(map(len, self.ids))


@dataclass(frozen=True)
class RowStream:
    """Rows that are read again and again, tokenised as they are needed, and made into batches.

    Each reader has its own rows, in an order of its own where they are shuffled. What it gives is decided by
    the seed and by which reader of how many it is; to begin at a later batch it passes over rows without
    tokenising them, unless batches are filled by tokens.

    Attributes:
        source: The rows.
        parser: How a row is read.
        tokenizer: How a row is tokenised.
        limit: Only this many rows of a pass, from the start.
        buffer: Rows among which one is drawn at random; 0 leaves them in order.
        seed: Decides what is drawn.
        batch_size: Rows of a batch; with `tokens_per_batch`, at most so many pairs.
        tokens_per_batch: Tokens of a batch, padding to its longest pair included: pairs follow each other
            into a batch until the next would not fit.
        handling: What happens where rows are bad.
    """

    source: RowSource
    parser: RowParser
    tokenizer: RowTokenizer
    limit: int | None
    buffer: int
    seed: int
    batch_size: int | None
    tokens_per_batch: int | None
    handling: BadRowHandling

    def batches(self, part: int, parts: int, *, first: int, stop: int) -> Iterator[StreamedBatch]:
        """The batches of one reader.

        Args:
            part: Which reader, from 0.
            parts: How many readers share the rows.
            first: Batches to pass over.
            stop: Where to end; nothing is tokenised beyond it, but a few rows for a batch filled by tokens.

        Raises:
            ValueError: If a bad row is to end the run, or there is no row for this reader.
        """
        rows = self._rows(part, parts)
        if self.tokens_per_batch is None:
            yield from self._of_rows(rows, first=first, stop=stop)
        else:
            yield from islice(self._of_tokens(rows), first, stop)

    def _of_rows(self, rows: Iterator[_Row], *, first: int, stop: int) -> Iterator[StreamedBatch]:
        """Batches of so many rows; a row that is bad is missing in its batch, so that places stay."""
        assert self.batch_size is not None
        size = self.batch_size
        for _ in islice(rows, first * size):
            pass
        spare: _Pair | None = None
        group = max(1, _AT_ONCE // size)
        for start in range(first, stop, group):
            taken = list(islice(rows, size * min(group, stop - start)))
            found = self._tokenised(taken)
            for begin in range(0, len(taken), size):
                part = found[begin : begin + size]
                report = self._report(taken[begin : begin + size], part)
                pairs = [pair for pair in part if isinstance(pair, _Pair)]
                spare = pairs[0] if pairs else spare or self._any_pair()
                yield StreamedBatch(self._batch(pairs, filler=spare), report)

    def _of_tokens(self, rows: Iterator[_Row]) -> Iterator[StreamedBatch]:
        assert self.tokens_per_batch is not None
        pairs: list[_Pair] = []
        longest = 0
        report = self._report([], [])
        while True:
            taken = list(islice(rows, _AT_ONCE))
            for row, pair in zip(taken, self._tokenised(taken), strict=True):
                if isinstance(pair, _Pair):
                    longer = max(longest, pair.size)
                    is_full = (
                        len(pairs) == self.batch_size or (len(pairs) + 1) * longer > self.tokens_per_batch
                    )
                    if pairs and is_full:
                        yield StreamedBatch(self._batch(pairs, filler=pairs[0]), report)
                        pairs, longer, report = [], pair.size, self._report([], [])
                    pairs.append(pair)
                    longest = longer
                report.merge(self._report([row], [pair]))

    def _rows(self, part: int, parts: int) -> Iterator[_Row]:
        for turn in count():
            is_empty = True
            own = part_of(self.source, part, parts, limit=self.limit)
            for row in _shuffled(own, self.buffer, seed=(self.seed, part, turn)):
                is_empty = False
                yield row
            if is_empty:
                raise ValueError(
                    f"`train` must have a row at least for each of the {parts} processes that read it (ranks "
                    f"times `num_workers`), got fewer in {self.source.name!r}"
                )

    def _tokenised(self, rows: Sequence[_Row]) -> list[_Pair | BadRow]:
        parsed: list[PreferencePair | BadRow] = []
        for _, record in rows:
            try:
                pair = self.parser(record)
                assert isinstance(pair, PreferencePair)
                parsed.append(pair)
            except BadRow as bad:
                parsed.append(bad)
        tokens = iter(self.tokenizer([row for row in parsed if not isinstance(row, BadRow)]))
        results: list[_Pair | BadRow] = []
        for row in parsed:
            found = row if isinstance(row, BadRow) else next(tokens)
            if isinstance(found, BadRow) or isinstance(row, BadRow):
                assert isinstance(found, BadRow)
                results.append(found)
            else:
                results.append(_Pair.of(row, found))
        return results

    def _report(self, rows: Sequence[_Row], results: Sequence[_Pair | BadRow]) -> RowReport:
        report = RowReport(self.source.name, self.parser.format, rows=len(rows))
        for (file, record), result in zip(rows, results, strict=True):
            if isinstance(result, BadRow):
                place = f"{file}:{record.line}"
                self.handling.apply_to_row(result.reason, place=place, detail=result.detail)
                report.add(result.reason, place=place, detail=result.detail)
            else:
                report.kept += 1
                report.truncated += result.is_truncated
        return report

    def _any_pair(self) -> _Pair:
        """A pair to fill a batch with, where no row of it, and none before, can be used."""
        for row in islice(self.source, self.limit):
            [pair] = self._tokenised([row])
            if isinstance(pair, _Pair):
                return pair
        raise ValueError(f"`train` must hold at least one usable row, got none in {self.source.name!r}")

    def _batch(self, pairs: Sequence[_Pair], *, filler: _Pair) -> PairBatch:
        used = pairs or [filler]
        margins = [pair.margin for pair in used if pair.margin is not None]
        return PairBatch.from_pairs(
            [TokenPair(*(np.asarray(ids, dtype=np.int64).tolist() for ids in pair.ids)) for pair in used],
            weights=[pair.weight for pair in pairs] or [0.0],
            margins=margins if len(margins) == len(used) else None,
            counted=[pair.counted for pair in used],
        )


def _shuffled(rows: Iterator[_Row], buffer: int, *, seed: Sequence[int]) -> Iterator[_Row]:
    """Draw from a buffer that is filled up as it is drawn from."""
    if buffer < 2:
        yield from rows
        return
    random = np.random.default_rng(seed)
    held = deque(islice(rows, buffer))
    for row in rows:
        place = int(random.integers(len(held)))
        drawn, held[place] = held[place], row
        yield drawn
    rest = list(held)
    for place in random.permutation(len(rest)):
        yield rest[place]
