"""Where a stream of rows comes from: `datasets.IterableDataset`, the hub without a download, or files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lightning_dpo.data.readers import Record, plain_row
from lightning_dpo.data.sources import RowSource, open_source

__all__ = ["is_stream", "open_stream", "part_of"]


@dataclass(frozen=True)
class _Stream:
    """The rows of an IterableDataset; each iteration begins anew."""

    name: str
    dataset: Any

    def fingerprint(self) -> str:
        """Nothing tells one stream from another, and none is kept."""
        raise TypeError("a stream is not kept")

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        # By `iter`: where it is iterated by itself in a worker of a loader, it takes that worker's shards.
        for number, columns in enumerate(self.dataset.with_format(None).iter(batch_size=1), 1):
            row = plain_row({column: values[0] for column, values in columns.items()})
            yield self.name, Record(number, row)

    def part(self, part: int, parts: int) -> Iterator[tuple[str, Record]] | None:
        """The shards of one of several readers; None where they cannot be divided evenly."""
        if self.dataset.num_shards % parts:
            return None
        return iter(_Stream(self.name, self.dataset.shard(num_shards=parts, index=part)))


def is_stream(rows: Any) -> bool:
    """Whether rows are a `datasets.IterableDataset`, which cannot be tokenised before training."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(rows, library.IterableDataset)


def open_stream(rows: Any, *, split: str) -> RowSource:
    """Find rows without reading them; a hub data set is not downloaded.

    Args:
        rows: A `datasets.IterableDataset`, or what `open_source` takes.
        split: The argument that named them.

    Raises:
        ValueError: If there is nothing there, naming `split` as the argument.
    """
    if is_stream(rows):
        return _Stream("IterableDataset", rows)
    source = open_source(rows, split=split, streaming=True)
    table = getattr(source, "table", None)
    return _Stream(source.name, table) if is_stream(table) else source


def part_of(source: RowSource, part: int, parts: int, *, limit: int | None) -> Iterator[tuple[str, Record]]:
    """The rows of one of several readers that share a stream without overlap.

    A reader has shards of its own where they can be divided evenly, else every row that is its turn.

    Args:
        source: All rows.
        part: Which reader, from 0.
        parts: How many there are.
        limit: Only this many rows of the source, from its start.
    """
    own = source.part(part, parts) if isinstance(source, _Stream) and limit is None else None
    return islice(islice(source, limit), part, None, parts) if own is None else own
