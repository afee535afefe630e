"""Reference log-probabilities by completion: in memory while a run lasts, in shards for those to come."""

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

__all__ = ["Lookup", "ReferenceCache", "Space"]

_log = logging.getLogger(__name__)

_FORMAT = 2
"""What shards hold: in the first format log-probabilities of pairs, in this one of completions."""

_SHARD_COMPLETIONS = 2**17
FLUSH_SECONDS = 15.0
FLUSH_SHARE = 20
"""A shard is written when so many pairs wait, or after 15 s or a twentieth of the time spent, the larger: an
interrupted pass loses little, and a pass of days still leaves tens of files and not thousands."""

_Positions = npt.NDArray[np.int64]


class Space(NamedTuple):
    """What decides a completion's log-probabilities besides its ids. Layout, loss and optimizer do not.

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
        return self._key(_FORMAT)

    @property
    def older_key(self) -> str:
        """Name of the folder in which an older version kept this reference's log-probabilities."""
        return self._key(_FORMAT - 1)

    def _key(self, version: int) -> str:
        text = json.dumps([version, *self])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Lookup(NamedTuple):
    """What the cache says of some keys, in their order.

    Attributes:
        logps: Log-probabilities, (completions,); anything where there is none.
        lengths: Tokens of each completion, (completions,).
        found: Whether there is one, (completions,).
        fresh: Whether it was computed in this run, or is still to be, (completions,).
    """

    logps: npt.NDArray[np.floating]
    lengths: npt.NDArray[np.int32]
    found: npt.NDArray[np.bool_]
    fresh: npt.NDArray[np.bool_]


class ReferenceCache:
    """The log-probabilities of one reference.

    Shards are files named by the checksum of their content, so that writers never meet and a torn or altered
    one is known. About 25 bytes are held in memory for each completion, and for each first part of one.

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
        self._older = f"{root.rstrip('/')}/{space.older_key}"
        self.location = f"{root.rstrip('/')}/{space.key}"
        self._folder = open_folder(self.location)
        self._entries = Entries.empty()
        self._first = np.empty(0, np.uint64)
        self._fresh = np.empty(0, np.bool_)
        self._loaded: set[str] = set()
        self._waiting: dict[tuple[int, int], tuple[int, int]] = {}
        self._new: list[Entries] = []
        self._began = self._flushed = time.monotonic()
        self.damaged: list[str] = []

    def __len__(self) -> int:
        """Completions that are known."""
        return len(self._first) + len(self._waiting)

    @property
    def waiting(self) -> int:
        """Completions that were computed and are not written yet."""
        return len(self._waiting)

    @property
    def loaded(self) -> frozenset[str]:
        """Shards whose content is known: read, or written by this process."""
        return frozenset(self._loaded)

    def names(self) -> list[str]:
        """Shards that are there now."""
        return self._folder.names()

    def load(self, names: Sequence[str] | None = None, *, fresh: bool = False) -> None:
        """Read shards that were not read yet; a damaged one is reported, set aside and not used.

        Args:
            names: Shards to read; None takes all that are there.
            fresh: Count what they hold as computed in this run.
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

    def find(self, keys: KeyArray) -> Lookup:
        """Look completions up.

        Args:
            keys: See `lightning_dpo.reference.cache.keys`, (completions, 2).
        """
        positions = self._positions(keys)
        found = positions >= 0
        at = positions[found]
        known = self._entries
        # What was computed in float64 and is not written yet must not be rounded.
        dtype = self._new[0].logps.dtype if self._new else known.logps.dtype
        logps, lengths, fresh = (
            np.zeros(len(keys), dtype),
            np.zeros(len(keys), np.int32),
            np.ones(len(keys), np.bool_),
        )
        logps[found], lengths[found], fresh[found] = known.logps[at], known.lengths[at], self._fresh[at]
        if self._waiting:
            for row in np.flatnonzero(~found):
                place = self._waiting.get(_words(keys[row]))
                if place is not None:
                    part, here = self._new[place[0]], place[1]
                    found[row], logps[row], lengths[row] = True, part.logps[here], part.lengths[here]
        return Lookup(logps, lengths, found, fresh)

    def mention_older(self) -> None:
        """Say so where an older version kept this reference: its values are not read, but computed again."""
        try:
            names = open_folder(self._older).names()
        except (OSError, ValueError):
            return
        if names and not self.names():
            _log.warning(
                "%s holds log-probabilities by pair, as an older version kept them; they are computed again "
                "by completion and kept in %s. The older folder may be removed",
                self._older,
                self.location,
            )

    def add(self, entries: Entries) -> None:
        """Take in what was computed; written by `flush`."""
        for row, key in enumerate(entries.keys):
            self._waiting.setdefault(_words(key), (len(self._new), row))
        self._new.append(entries)

    @property
    def is_flush_due(self) -> bool:
        """Whether enough waits, or has waited long enough, to be written."""
        now = time.monotonic()
        pause = max(FLUSH_SECONDS, (now - self._began) / FLUSH_SHARE)
        return bool(self._new) and (len(self._waiting) >= _SHARD_COMPLETIONS or now - self._flushed >= pause)

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
        self._merge(entries, fresh=True)
        self._flushed = time.monotonic()

    def _merge(self, entries: Entries, *, fresh: bool) -> None:
        """Add completions to the sorted arrays; what is known already stays."""
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
        self._first = np.ascontiguousarray(self._entries.keys[:, 0])

    def _positions(self, keys: KeyArray) -> _Positions:
        """Where each key stands in the sorted arrays, -1 where it is not."""
        if not len(self._first):
            return np.full(len(keys), -1, np.int64)
        at = np.minimum(np.searchsorted(self._first, keys[:, 0]), len(self._first) - 1)
        result = np.where((self._entries.keys[at] == keys).all(axis=1), at, -1)
        for row in np.flatnonzero((result < 0) & (self._first[at] == keys[:, 0])):
            # As good as never do two keys share their first word.
            same = np.flatnonzero((self._entries.keys == keys[row]).all(axis=1))
            result[row] = same[0] if len(same) else -1
        return result


def _words(key: npt.NDArray[np.uint64]) -> tuple[int, int]:
    return int(key[0]), int(key[1])
