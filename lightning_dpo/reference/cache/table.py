"""Log-probabilities in the order of their keys: in memory, or as a file that processes share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import numpy as safetensors

from lightning_dpo.files import scratch_name
from lightning_dpo.reference.cache.keys import KeyArray
from lightning_dpo.reference.cache.shards import Entries

__all__ = ["Index", "Table"]

_Words = npt.NDArray[np.uint64]
_Positions = npt.NDArray[np.int64]

_VERSION = 1
_MANY = 4096
"""So many keys are looked up in their own order, for the sake of the processor's cache and of pages."""

_TYPES = {"U64": "<u8", "F64": "<f8", "F32": "<f4", "I32": "<i4"}


class Table(NamedTuple):
    """Log-probabilities of completions, sorted by key, each key once.

    Attributes:
        first: First word of each key, rising, (completions,).
        second: Second word of each key, rising where first words are the same, (completions,).
        logps: Sums over completion tokens, natural log, (completions,).
        lengths: Tokens of each completion, (completions,).
    """

    first: _Words
    second: _Words
    logps: npt.NDArray[np.floating]
    lengths: npt.NDArray[np.int32]

    @classmethod
    def of(cls, entries: Entries) -> tuple[Table, _Positions]:
        """Sort entries; of several with one key the first is taken.

        Returns:
            The table, and which entry each of its rows is, (completions,).
        """
        first = np.ascontiguousarray(entries.keys[:, 0])
        order = np.argsort(first, kind="stable")
        if (np.diff(first[order]) == 0).any():  # seldom but for keys that are there twice
            order = np.lexsort((entries.keys[:, 1], first))
            ordered = entries.keys[order]
            repeated = np.zeros(len(order), np.bool_)
            repeated[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
            order = order[~repeated]
        keys, logps, lengths = entries.select(order)
        columns = (np.ascontiguousarray(keys[:, 0]), np.ascontiguousarray(keys[:, 1]))
        return cls(*columns, logps, lengths), order

    @property
    def size(self) -> int:
        """Completions."""
        return len(self.first)

    def entries(self) -> Entries:
        """All rows, in their order."""
        return Entries(np.stack([self.first, self.second], axis=1), self.logps, self.lengths)

    def positions(self, keys: KeyArray) -> _Positions:
        """The row of each key, -1 where there is none, (keys,)."""
        if not self.size or not len(keys):
            return np.full(len(keys), -1, np.int64)
        if len(keys) > _MANY:
            order = np.argsort(keys[:, 0])
            result = np.empty(len(keys), np.int64)
            result[order] = self._positions(keys[order])
            return result
        return self._positions(keys)

    def _positions(self, keys: KeyArray) -> _Positions:
        wanted = np.ascontiguousarray(keys[:, 0])
        at = np.minimum(np.searchsorted(self.first, wanted), self.size - 1)
        is_first = self.first[at] == wanted
        result = np.where(is_first & (self.second[at] == keys[:, 1]), at, -1)
        for row in np.flatnonzero(is_first & (result < 0)):
            # As good as never do two keys share their first word.
            place = int(at[row]) + 1
            while place < self.size and self.first[place] == wanted[row]:
                if self.second[place] == keys[row, 1]:
                    result[row] = place
                    break
                place += 1
        return result


class Index(NamedTuple):
    """A table as a file of this machine that is memory-mapped: pages are read as keys are looked up.

    Attributes:
        table: Views of the file.
        covers: The shards that it was made of, with what told them from altered ones.
    """

    table: Table
    covers: dict[str, str]

    @classmethod
    def open(cls, path: Path, *, verify: bool) -> Index | None:
        """Map the file; None where it is missing, torn or altered.

        Args:
            path: The file.
            verify: Read all of it and compare its checksum, which one process of a machine does.
        """
        try:
            whole = np.memmap(path, dtype=np.uint8, mode="r")
            start = 8 + int.from_bytes(whole[:8].tobytes(), "little")
            header: dict[str, Any] = json.loads(whole[8:start].tobytes())
            about = json.loads(header.pop("__metadata__")["index"])
            table = Table(*(_mapped(whole[start:], header[name]) for name in Table._fields))
            covers: dict[str, str] = dict(about["covers"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        sizes = {len(column) for column in table}
        if about.get("version") != _VERSION or len(sizes) != 1:
            return None
        return None if verify and _checksum(table) != about.get("checksum") else cls(table, covers)

    @staticmethod
    def write(path: Path, table: Table, *, covers: Mapping[str, str]) -> None:
        """Write a table beside its place and rename it.

        Args:
            path: The file that appears, or is replaced.
            table: What it holds.
            covers: The shards that it was made of, with what tells them from altered ones.

        Raises:
            OSError: If it cannot be written; what was there still is.
        """
        about = {"version": _VERSION, "covers": dict(covers), "checksum": _checksum(table)}
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(scratch_name(path.name))
        try:
            columns = {name: np.ascontiguousarray(column) for name, column in table._asdict().items()}
            # One entry of metadata: several are written in any order.
            safetensors.save_file(columns, scratch, metadata={"index": json.dumps(about, sort_keys=True)})
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)


def _mapped(data: npt.NDArray[np.uint8], column: Mapping[str, Any]) -> npt.NDArray[Any]:
    first, last = column["data_offsets"]
    [size] = column["shape"]
    view: npt.NDArray[Any] = np.asarray(data[first:last]).view(_TYPES[column["dtype"]])
    if len(view) != size:
        raise ValueError("the file is torn")
    return view


def _checksum(table: Table) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for column in table:
        digest.update(np.ascontiguousarray(column).view(np.uint8).data)
    return digest.hexdigest()
