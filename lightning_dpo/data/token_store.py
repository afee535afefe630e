"""Tokenised pairs on disk: Arrow files that are memory-mapped, found again by what they were made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lightning_dpo.data.bad_rows import RowReport
from lightning_dpo.files import scratch_folder
from lightning_dpo.types import TokenPair

__all__ = ["SCHEMA", "EntryWriter", "TokenStore", "arrow_batch", "new_entry"]

_PAIRS, _REPORT = "pairs.arrow", "report.json"

SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.list_(pa.int32())) for name in TokenPair._fields),
        pa.field("row", pa.int64()),
    ]
)
"""Token ids of each pair, and the number of its row in the source, from 0."""


def schema_with(numbers: Sequence[str]) -> pa.Schema:
    """The schema of pairs that have further numbers; `SCHEMA` where they have none.

    Args:
        numbers: What the numbers are called: "margin", "weight".
    """
    return pa.schema([*SCHEMA, *(pa.field(name, pa.float32()) for name in numbers)])


def arrow_batch(
    pairs: Sequence[TokenPair],
    *,
    rows: Sequence[int],
    numbers: Mapping[str, Sequence[float]] | None = None,
) -> pa.RecordBatch:
    """Pairs as Arrow columns.

    Args:
        pairs: Token ids.
        rows: The number of each pair's row in the source, from 0.
        numbers: Further numbers of each pair, by what they are called.
    """
    numbers = numbers or {}
    columns = [_ids([pair[part] for pair in pairs]) for part in range(len(TokenPair._fields))]
    columns += [pa.array(rows, pa.int64()), *(pa.array(column, pa.float32()) for column in numbers.values())]
    return pa.RecordBatch.from_arrays(columns, schema=schema_with(list(numbers)))


def _ids(parts: Sequence[Sequence[int]]) -> pa.ListArray:
    offsets = np.zeros(len(parts) + 1, dtype=np.int32)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    values = np.fromiter(chain.from_iterable(parts), dtype=np.int32, count=offsets[-1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


class _Piece(NamedTuple):
    """One record batch: where the ids of each pair begin, the ids, and numbers; views of the mapped file."""

    offsets: tuple[npt.NDArray[np.int32], ...]
    values: tuple[npt.NDArray[np.int32], ...]
    rows: npt.NDArray[np.int64]
    numbers: dict[str, npt.NDArray[np.float32]]


class TokenStore(Sequence[TokenPair]):
    """Tokenised pairs, read from disk as they are asked for; only their lengths and numbers are in memory.

    Attributes:
        path: The cache entry.
        report: What became of every row.
        prompt_lengths: Tokens of each prompt, (pairs,).
        chosen_lengths: Tokens of each preferred completion, (pairs,).
        rejected_lengths: Tokens of each other completion, (pairs,).
        margins: By how much each chosen completion's score is above the rejected one's, (pairs,); None where
            the data do not say.
        weights: What each pair counts, (pairs,); None where the data do not say, so that all count 1.
    """

    def __init__(self, path: Path) -> None:
        """Open a cache entry that `new_entry` wrote."""
        self.path = path
        self.report = RowReport.from_dict(json.loads((path / _REPORT).read_text(encoding="utf-8")))
        self._open()
        lengths = [[np.diff(piece.offsets[part]) for piece in self._pieces] for part in range(3)]
        self.prompt_lengths, self.chosen_lengths, self.rejected_lengths = (
            np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32) for parts in lengths
        )
        self.margins, self.weights = (self._numbers(name) for name in ("margin", "weight"))

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether there is a complete cache entry."""
        return (path / _REPORT).is_file() and (path / _PAIRS).is_file()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> TokenPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenPair]: ...
    def __getitem__(self, index: int | slice) -> TokenPair | list[TokenPair]:
        """A pair, its ids as int32 arrays that cannot be written to."""
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        piece, at = self._find(index)
        prompt, chosen, rejected = (
            values[offsets[at] : offsets[at + 1]]
            for offsets, values in zip(piece.offsets, piece.values, strict=True)
        )
        return TokenPair(prompt, chosen, rejected)  # type: ignore[arg-type]

    def row(self, index: int) -> int:
        """The number of a pair's row in the source, from 0."""
        piece, at = self._find(index)
        return int(piece.rows[at])

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are not forked map the file themselves.
        return {k: v for k, v in self.__dict__.items() if k not in ("_file", "_pieces", "_starts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _numbers(self, name: str) -> npt.NDArray[np.float32] | None:
        columns = [piece.numbers[name] for piece in self._pieces if name in piece.numbers]
        return np.concatenate(columns) if columns else None

    def _find(self, index: int) -> tuple[_Piece, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} pairs, got index {index}")
        index %= len(self)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._pieces[number], index - int(self._starts[number])

    def _open(self) -> None:
        self._file = pa.memory_map(str(self.path / _PAIRS))
        reader = pa.ipc.open_file(self._file)
        batches = [reader.get_batch(k) for k in range(reader.num_record_batches)]
        self._pieces = [_piece(batch) for batch in batches if batch.num_rows]
        self._starts = np.cumsum([0, *(len(piece.rows) for piece in self._pieces)])


def _piece(batch: pa.RecordBatch) -> _Piece:
    columns = [batch.column(k) for k in range(3)]
    return _Piece(
        tuple(column.offsets.to_numpy() for column in columns),
        tuple(column.values.to_numpy() for column in columns),
        batch.column(3).to_numpy(),
        {name: batch.column(name).to_numpy() for name in batch.schema.names[4:]},
    )


class EntryWriter:
    """Writes a cache entry."""

    def __init__(self, folder: Path, numbers: Sequence[str]) -> None:
        """Begin an entry in an empty folder."""
        self._folder = folder
        self._file = pa.OSFile(str(folder / _PAIRS), "wb")
        self._writer = pa.ipc.new_file(self._file, schema_with(numbers))

    def write(self, batch: pa.RecordBatch) -> None:
        """Append pairs."""
        self._writer.write_batch(batch)

    def finish(self, report: RowReport) -> None:
        """Add the report; last of all."""
        (self._folder / _REPORT).write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")

    def close(self) -> None:
        """Close the file of pairs."""
        self._writer.close()
        self._file.close()


@contextmanager
def new_entry(path: Path, *, numbers: Sequence[str] = ()) -> Iterator[EntryWriter]:
    """Write a cache entry that appears complete or not at all.

    Processes may write the same entry at the same time: the first to finish is kept.

    Args:
        path: The folder that appears.
        numbers: What further numbers the pairs have.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        with scratch_folder(path) as folder:
            writer = EntryWriter(folder, numbers)
            try:
                yield writer
            finally:
                writer.close()
    except OSError:
        if not TokenStore.exists(path):
            raise
