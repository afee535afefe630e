"""Reference log-probabilities by pair: in memory while a run lasts, in shards for the runs to come."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_dpo.reference.cache.folder import open_folder
from lightning_dpo.reference.cache.keys import KeyArray
from lightning_dpo.reference.cache.shards import DamagedShardError, Entries, decode, encode, join

__all__ = ["CacheUsage", "ReferenceCache", "Space"]

_log = logging.getLogger(__name__)

_FORMAT = 1
_SHARD_PAIRS = 65536
_FLUSH_SECONDS = 15.0
_FLUSH_SHARE = 20
"""A shard is written when so many pairs wait, or after 15 s or a twentieth of the time spent, the larger: an
interrupted pass loses little, and a pass of days still leaves tens of files and not thousands."""

_Positions = npt.NDArray[np.int64]


class Space(NamedTuple):
    """What decides a pair's log-probabilities besides its ids. Layout, loss and optimizer do not.

    Attributes:
        weights: Identity of the reference's weights; see `lightning_dpo.models.identity`.
        dtype: Type the weights were loaded in, and the type they are computed in.
        precision: Autocast's type and the precision of float32 matrix products.
        attention: The attention implementation that was asked for.
    """

    weights: str
    dtype: str
    precision: str
    attention: str

    @property
    def key(self) -> str:
        """Name of the folder that holds this reference's shards."""
        text = json.dumps([_FORMAT, *self])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class CacheUsage(NamedTuple):
    """What a run took from the cache.

    Attributes:
        passes: Forward passes of the reference, on all ranks.
        pairs: Different pairs that were asked for.
        from_cache: Those that were there when the run began.
        damaged: Shards that were found damaged.
    """

    passes: int
    pairs: int
    from_cache: int
    damaged: int = 0

    def __str__(self) -> str:
        damaged = f"; {self.damaged} damaged shards were set aside" if self.damaged else ""
        return (
            f"reference passes: {self.passes} "
            f"({self.from_cache} of {self.pairs} pairs from the cache{damaged})"
        )


class ReferenceCache:
    """The log-probabilities of one reference.

    Shards are files named by the checksum of their content, so that writers never meet and a torn or altered
    one is known. About 45 bytes a pair are held in memory.

    Attributes:
        location: Folder or URL of this reference's shards.
        damaged: Names of shards that were found damaged.
    """

    def __init__(self, root: str, *, space: Space) -> None:
        """Name a cache; nothing is read before `load` and nothing written before `flush`.

        Args:
            root: Folder or fsspec URL that holds the shards of all references.
            space: The reference.
        """
        self._space = space.key
        self.location = f"{root.rstrip('/')}/{space.key}"
        self._folder = open_folder(self.location)
        self._entries = Entries.empty()
        self._first = np.empty(0, np.uint64)
        self._fresh = np.empty(0, np.bool_)
        self._seen = np.empty(0, np.bool_)
        self._loaded: set[str] = set()
        self._waiting: dict[tuple[int, int], tuple[int, int]] = {}
        self._new: list[Entries] = []
        self._began = self._flushed = time.monotonic()
        self.damaged: list[str] = []

    def __len__(self) -> int:
        """Pairs that are known."""
        return len(self._first) + len(self._waiting)

    @property
    def waiting(self) -> int:
        """Pairs that were computed and are not written yet."""
        return len(self._waiting)

    @property
    def loaded(self) -> frozenset[str]:
        """Shards whose pairs are known: read, or written by this process."""
        return frozenset(self._loaded)

    def names(self) -> list[str]:
        """Shards that are there now."""
        return self._folder.names()

    def load(self, names: Sequence[str] | None = None, *, fresh: bool = False) -> None:
        """Read shards that were not read yet; a damaged one is reported, set aside and not used.

        Args:
            names: Shards to read; None takes all that are there.
            fresh: Count their pairs as computed in this run.
        """
        parts = []
        for name in self.names() if names is None else names:
            if name in self._loaded:
                continue
            try:
                parts.append(decode(name, self._folder.read(name), space=self._space))
            except FileNotFoundError:
                continue  # another process has set it aside
            except DamagedShardError as error:
                self.damaged.append(name)
                _log.warning(
                    "a shard of the reference cache is damaged and is computed again: %s/%s: %s",
                    self.location,
                    name,
                    error,
                )
                self._folder.set_aside(name)
                continue
            self._loaded.add(name)
        self._merge(join(parts), fresh=fresh)

    def find(self, keys: KeyArray) -> tuple[Entries, npt.NDArray[np.bool_]]:
        """Look pairs up.

        Args:
            keys: (pairs, 2).

        Returns:
            The entries, in the order of the keys, with anything where there is none; and which there are,
            (pairs,).
        """
        positions = self._positions(keys)
        here = positions >= 0
        self._seen[positions[here]] = True
        entries = Entries(
            keys.copy(),
            np.zeros((len(keys), self._entries.sums.shape[1]), self._entries.sums.dtype),
            np.zeros((len(keys), 2), np.int32),
        )
        entries.sums[here] = self._entries.sums[positions[here]]
        entries.lengths[here] = self._entries.lengths[positions[here]]
        if self._waiting:
            entries = entries._replace(sums=entries.sums.astype(self._new[0].sums.dtype, copy=False))
            for row in np.flatnonzero(~here):
                place = self._waiting.get(_pair(keys[row]))
                if place is not None:
                    part, at = self._new[place[0]], place[1]
                    here[row], entries.sums[row], entries.lengths[row] = True, part.sums[at], part.lengths[at]
        return entries, here

    def add(self, entries: Entries) -> None:
        """Take in what was computed; written by `flush`."""
        for row, key in enumerate(entries.keys):
            self._waiting.setdefault(_pair(key), (len(self._new), row))
        self._new.append(entries)

    @property
    def is_flush_due(self) -> bool:
        """Whether enough waits, or has waited long enough, to be written."""
        now = time.monotonic()
        pause = max(_FLUSH_SECONDS, (now - self._began) / _FLUSH_SHARE)
        return bool(self._new) and (len(self._waiting) >= _SHARD_PAIRS or now - self._flushed >= pause)

    def flush(self) -> None:
        """Write what waits as one shard.

        Raises:
            OSError: If it cannot be written; it still waits then, and is served.
        """
        if not self._new:
            return
        starts = np.cumsum([0, *(len(part.keys) for part in self._new)])
        rows = np.array([starts[part] + row for part, row in self._waiting.values()])
        entries = join(self._new).select(rows)
        name, data = encode(entries, space=self._space)
        self._folder.write(name, data)
        self._loaded.add(name)
        self._new, self._waiting = [], {}
        self._merge(entries, fresh=True, seen=True)
        self._flushed = time.monotonic()

    def seen(self) -> tuple[KeyArray, npt.NDArray[np.bool_]]:
        """Keys that were asked for, and which of them were computed in this run."""
        waiting = np.array(list(self._waiting), dtype=np.uint64).reshape(-1, 2)
        keys = np.concatenate([self._entries.keys[self._seen], waiting])
        return keys, np.concatenate([self._fresh[self._seen], np.ones(len(waiting), np.bool_)])

    def _merge(self, entries: Entries, *, fresh: bool, seen: bool = False) -> None:
        """Add pairs to the sorted arrays; what is known already stays."""
        if not len(entries.keys):
            return
        every = join([self._entries, entries]) if len(self._first) else entries
        added = len(entries.keys)
        order = np.lexsort((every.keys[:, 1], every.keys[:, 0]))  # stable: the known one of two comes first
        ordered = every.keys[order]
        repeated = np.zeros(len(order), np.bool_)
        repeated[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
        order = order[~repeated]
        self._entries = every.select(order)
        self._fresh = np.concatenate([self._fresh, np.full(added, fresh)])[order]
        self._seen = np.concatenate([self._seen, np.full(added, seen)])[order]
        self._first = np.ascontiguousarray(self._entries.keys[:, 0])

    def _positions(self, keys: KeyArray) -> _Positions:
        """Where each key stands in the sorted arrays, -1 where it is not."""
        result = np.full(len(keys), -1, np.int64)
        for row, start in enumerate(np.searchsorted(self._first, keys[:, 0])):
            at = int(start)
            while at < len(self._first) and self._first[at] == keys[row, 0]:
                if self._entries.keys[at, 1] == keys[row, 1]:
                    result[row] = at
                    break
                at += 1
        return result


def _pair(key: npt.NDArray[np.uint64]) -> tuple[int, int]:
    return int(key[0]), int(key[1])
