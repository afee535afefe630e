"""Tokenised rows on disk: Arrow files that are memory-mapped, found again by what they were made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lightning_dpo.data.bad_rows import RowReport
from lightning_dpo.files import scratch_folder, scratch_name, write_file
from lightning_dpo.types import TokenExample, TokenPair
from lightning_dpo.types.completion_keys import KEY_WORDS, KeyArray, keys_of_row

__all__ = [
    "EXAMPLE_SCHEMA",
    "SCHEMA",
    "EntryWriter",
    "TokenRow",
    "TokenStore",
    "arrow_batch",
    "entry_files",
    "new_entry",
    "row_keys",
]

_FILES = {TokenPair: "pairs.arrow", TokenExample: "examples.arrow"}
_REPORT = "report.json"
_KEYS = "completion_keys"
"""The folder beside those of entries with a file for each: the keys of its rows' completions."""

_KEYS_OF_A_ROW = {TokenPair: 4, TokenExample: 1}

TokenRow: TypeAlias = TokenPair | TokenExample
"""A row of the data as token ids."""

SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.list_(pa.int32())) for name in TokenPair._fields),
        pa.field("row", pa.int64()),
    ]
)
"""Token ids of each pair, and the number of its row in the source, from 0."""


EXAMPLE_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.list_(pa.int32())) for name in ("prompt_ids", "completion_ids")),
        pa.field("label", pa.bool_()),
        pa.field("row", pa.int64()),
    ]
)
"""Token ids of each example, whether it is desirable, and the number of its row in the source, from 0."""

_SCHEMAS = {TokenPair: SCHEMA, TokenExample: EXAMPLE_SCHEMA}


_COUNTED = {
    TokenPair: ("chosen_counted", "rejected_counted"),
    TokenExample: ("completion_counted",),
}
"""Optional columns: 1 for each completion token that is trained on, 0 for others; empty where all are."""


def schema_with(
    numbers: Sequence[str], kind: type[TokenRow] = TokenPair, *, has_turns: bool = False
) -> pa.Schema:
    """The schema of rows that have further columns; that of their kind alone where they have none.

    Args:
        numbers: What their numbers are called: "margin", "weight".
        kind: What the rows are.
        has_turns: Whether they say which completion tokens are trained on.
    """
    counted = _COUNTED[kind] if has_turns else ()
    return pa.schema(
        [
            *_SCHEMAS[kind],
            *(pa.field(name, pa.float32()) for name in numbers),
            *(pa.field(name, pa.list_(pa.uint8())) for name in counted),
        ]
    )


def arrow_batch(
    pairs: Sequence[TokenRow],
    *,
    rows: Sequence[int],
    kind: type[TokenRow] = TokenPair,
    numbers: Mapping[str, Sequence[float]] | None = None,
    counted: Sequence[Sequence[Sequence[bool] | None]] | None = None,
) -> pa.RecordBatch:
    """Tokenised rows as Arrow columns.

    Args:
        pairs: Pairs or examples.
        rows: The number of each one's row in the source, from 0.
        kind: What they are.
        numbers: Further numbers of each row, by what they are called.
        counted: For each row and each of its completions, whether each token is trained on; None for one of
            which all are.
    """
    numbers = numbers or {}
    schema = schema_with(list(numbers), kind, has_turns=counted is not None)
    columns = [_column([pair[k] for pair in pairs], schema.types[k]) for k in range(len(kind._fields))]
    columns += [pa.array(rows, pa.int64()), *(pa.array(column, pa.float32()) for column in numbers.values())]
    if counted is not None:
        for place in range(len(_COUNTED[kind])):
            columns.append(_lists([masks[place] or () for masks in counted], np.uint8))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _column(values: Sequence[Any], type: pa.DataType) -> pa.Array:
    return _lists(values, np.int32) if pa.types.is_list(type) else pa.array(values, type)


def _lists(parts: Sequence[Sequence[int]], dtype: npt.DTypeLike) -> pa.ListArray:
    offsets = np.zeros(len(parts) + 1, dtype=np.int32)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    values = np.fromiter(chain.from_iterable(parts), dtype=dtype, count=offsets[-1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


class _Piece(NamedTuple):
    """One record batch: where the ids of each part begin, the ids, labels, numbers and masks.

    All are views of the file.
    """

    offsets: tuple[npt.NDArray[np.int32], ...]
    values: tuple[npt.NDArray[np.int32], ...]
    labels: npt.NDArray[np.bool_] | None
    rows: npt.NDArray[np.int64]
    numbers: dict[str, npt.NDArray[np.float32]]
    counted: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]]


class TokenStore(Sequence[TokenRow]):
    """Tokenised pairs or examples, read from disk as asked for; only lengths and numbers are in memory.

    Attributes:
        path: The cache entry.
        kind: What it holds, TokenPair or TokenExample.
        report: What became of every row.
        part_lengths: Tokens of the prompt, and of the completion or of both in turn, (rows,) each.
        labels: Whether each example is desirable, (rows,); None for pairs.
        margins: By how much each chosen completion's score is above the rejected one's, (rows,); None where
            the data do not say.
        weights: What each row counts, (rows,); None where the data do not say, so that all count 1.
    """

    def __init__(self, path: Path, kind: type[TokenRow] = TokenPair) -> None:
        """Open a cache entry that `new_entry` wrote."""
        self.path = path
        self.kind = kind
        self.report = RowReport.from_dict(json.loads((path / _REPORT).read_text(encoding="utf-8")))
        self._open()
        empty = np.zeros(0, dtype=np.int32)
        self.part_lengths = tuple(
            np.concatenate([empty, *(np.diff(piece.offsets[part]) for piece in self._pieces)])
            for part in range(_parts(kind))
        )
        labels = [piece.labels for piece in self._pieces if piece.labels is not None]
        self.labels = np.concatenate(labels) if labels else None
        self.margins, self.weights = (self._numbers(name) for name in ("margin", "weight"))

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether there is a complete cache entry."""
        return (path / _REPORT).is_file() and any((path / name).is_file() for name in _FILES.values())

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenRow]: ...
    def __getitem__(self, index: int | slice) -> TokenRow | list[TokenRow]:
        """A pair or an example, its ids as int32 arrays that cannot be written to."""
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        piece, at = self._find(index)
        ids = [
            values[offsets[at] : offsets[at + 1]]
            for offsets, values in zip(piece.offsets, piece.values, strict=True)
        ]
        return self.kind(*ids) if piece.labels is None else self.kind(*ids, bool(piece.labels[at]))  # type: ignore[arg-type, call-arg]

    def row(self, index: int) -> int:
        """The number in the source, from 0, of the row at an index."""
        piece, at = self._find(index)
        return int(piece.rows[at])

    def counted(self, index: int) -> tuple[npt.NDArray[np.bool_] | None, ...] | None:
        """For each completion of a row whether each of its tokens is trained on; None where all are."""
        piece, at = self._find(index)
        masks = [values[offsets[at] : offsets[at + 1]] for offsets, values in piece.counted]
        if not any(map(len, masks)):
            return None
        return tuple(mask.astype(np.bool_) if len(mask) else None for mask in masks)

    @property
    def has_keys(self) -> bool:
        """Whether the keys of its completions lie beside the tokens; not so in entries of older versions."""
        return self._keys() is not None

    def keys_of(self, rows: npt.NDArray[np.int64]) -> KeyArray | None:
        """Keys of the completions of some rows, as `keys_of_row` gives them; None unless they are kept.

        Args:
            rows: Numbers of rows, (rows,).

        Returns:
            Read from a memory-mapped file, (rows, keys of a row, 2).
        """
        keys = self._keys()
        return None if keys is None else keys[rows]

    def write_keys(self) -> None:
        """Work out the keys of all completions and put them beside the tokens, unless they are there.

        Raises:
            OSError: If they cannot be written.
        """
        if self.has_keys:
            return
        keys = np.empty((len(self), _KEYS_OF_A_ROW[self.kind], KEY_WORDS), dtype="<u8")
        for index in range(len(self)):
            row: Any = self[index]
            keys[index] = row_keys(row, self.counted(index))
        write_file(_keys_file(self.path), keys.tobytes())

    def _keys(self) -> KeyArray | None:
        shape = (len(self), _KEYS_OF_A_ROW[self.kind], KEY_WORDS)
        path = _keys_file(self.path)
        try:
            if path.stat().st_size != 8 * int(np.prod(shape)) or not len(self):
                return None
            return np.memmap(path, dtype="<u8", mode="r", shape=shape)
        except OSError:
            return None

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
            raise IndexError(f"there are {len(self)} rows, got index {index}")
        index %= len(self)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._pieces[number], index - int(self._starts[number])

    def _open(self) -> None:
        self._file = pa.memory_map(str(self.path / _FILES[self.kind]))
        reader = pa.ipc.open_file(self._file)
        batches = [reader.get_batch(k) for k in range(reader.num_record_batches)]
        self._pieces = [_piece(batch, self.kind) for batch in batches if batch.num_rows]
        self._starts = np.cumsum([0, *(len(piece.rows) for piece in self._pieces)])


def row_keys(
    row: TokenRow, counted: Sequence[Sequence[bool] | npt.NDArray[np.bool_] | None] | None
) -> KeyArray:
    """Keys of a row's completions, see `keys_of_row`.

    Args:
        row: Its token ids.
        counted: For each completion whether each of its tokens is trained on; None where all are.
    """
    prompt, *completions = (np.asarray(part, dtype=np.int64) for part in row if not isinstance(part, bool))
    masks = [
        None if mask is None or not len(mask) else np.asarray(mask, dtype=np.bool_) for mask in counted or ()
    ]
    return keys_of_row(prompt, completions, masks or None)


def entry_files(path: Path, kind: type[TokenRow]) -> tuple[Path, Path, Path]:
    """The files of a cache entry: its rows, the keys of their completions (may be missing), its report."""
    return path / _FILES[kind], _keys_file(path), path / _REPORT


def _keys_file(entry: Path) -> Path:
    return entry.parents[1] / _KEYS / f"{entry.name}.u64"


def _parts(kind: type[TokenRow]) -> int:
    """Columns of token ids: those before the label and the row."""
    return sum(pa.types.is_list(type) for type in _SCHEMAS[kind].types)


def _piece(batch: pa.RecordBatch, kind: type[TokenRow]) -> _Piece:
    columns = [batch.column(k) for k in range(_parts(kind))]
    further = batch.schema.names[len(_SCHEMAS[kind]) :]
    counted = [batch.column(name) for name in further if name in _COUNTED[kind]]
    return _Piece(
        tuple(column.offsets.to_numpy() for column in columns),
        tuple(column.values.to_numpy() for column in columns),
        batch.column("label").to_numpy(zero_copy_only=False) if kind is TokenExample else None,
        batch.column("row").to_numpy(),
        {name: batch.column(name).to_numpy() for name in further if name not in _COUNTED[kind]},
        [(column.offsets.to_numpy(), column.values.to_numpy()) for column in counted],
    )


class EntryWriter:
    """Writes a cache entry."""

    def __init__(self, folder: Path, kind: type[TokenRow], schema: pa.Schema, *, keys_path: Path) -> None:
        """Begin an entry in an empty folder; keys, if there are any, go to a file of their own."""
        self._folder = folder
        self._file = pa.OSFile(str(folder / _FILES[kind]), "wb")
        self._writer = pa.ipc.new_file(self._file, schema)
        self._keys_path = keys_path
        self._keys: BinaryIO | None = None

    def write(self, batch: pa.RecordBatch, *, keys: KeyArray | None = None) -> None:
        """Append rows.

        Args:
            batch: The rows.
            keys: Keys of their completions, (rows, keys of a row, 2); where some have none, none are kept.
        """
        self._writer.write_batch(batch)
        if keys is not None:
            if self._keys is None:
                self._keys_path.parent.mkdir(parents=True, exist_ok=True)
                scratch = self._keys_path.with_name(scratch_name(self._keys_path.name))
                self._keys = scratch.open("wb")
            self._keys.write(keys.astype("<u8", copy=False).tobytes())

    def finish(self, report: RowReport) -> None:
        """Add the report; last of all."""
        if self._keys is not None:
            self._keys.close()
            Path(self._keys.name).replace(self._keys_path)
        (self._folder / _REPORT).write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")

    def close(self) -> None:
        """Close the file of rows."""
        self._writer.close()
        self._file.close()
        if self._keys is not None:
            self._keys.close()
            Path(self._keys.name).unlink(missing_ok=True)


@contextmanager
def new_entry(
    path: Path,
    kind: type[TokenRow] = TokenPair,
    *,
    numbers: Sequence[str] = (),
    has_turns: bool = False,
) -> Iterator[EntryWriter]:
    """Write a cache entry that appears complete or not at all.

    Processes may write the same entry at the same time: the first to finish is kept.

    Args:
        path: The folder that appears.
        kind: What it will hold.
        numbers: What further numbers the rows have.
        has_turns: Whether they say which completion tokens are trained on.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        with scratch_folder(path) as folder:
            writer = EntryWriter(
                folder,
                kind,
                schema_with(numbers, kind, has_turns=has_turns),
                keys_path=_keys_file(path),
            )
            try:
                yield writer
            finally:
                writer.close()
    except OSError:
        if not TokenStore.exists(path):
            raise
