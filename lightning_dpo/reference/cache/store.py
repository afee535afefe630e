"""Reference log-probabilities by completion: in memory while a run lasts, in shards for those to come."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_dpo.files import cache_folder
from lightning_dpo.reference.cache.folder import open_folder
from lightning_dpo.reference.cache.keys import KeyArray
from lightning_dpo.reference.cache.shards import DamagedShardError, Entries, decode, encode, join
from lightning_dpo.reference.cache.table import Index, Table

__all__ = ["Lookup", "ReferenceCache", "Space"]

_log = logging.getLogger(__name__)

_FORMAT = 2
"""What shards hold: in the first format log-probabilities of pairs, in this one of completions."""

_SHARD_COMPLETIONS = 2**17
FLUSH_SECONDS = 15.0
FLUSH_SHARE = 20
"""A shard is written when so many pairs wait, or after 15 s or a twentieth of the time spent, the larger: an
interrupted pass loses little, and a pass of days still leaves tens of files and not thousands."""

INDEX_FROM = 2**16
INDEX_SHARE = 4
"""So many completions are put into the index, if they are also a quarter of those that it has already."""


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
    one is known. What many of them hold is kept sorted in one file of each machine, the index, which
    processes map into their memory instead of reading shards; an index that is missing or torn, or made of
    shards that have changed, is made again. Of what is in no index, about 25 bytes are held for each
    completion, and for each first part of one.

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
        self._index: Index | None = None
        self._table, _ = Table.of(Entries.empty())
        self._fresh = np.empty(0, np.bool_)
        self._loaded: set[str] = set()
        self._waiting: dict[tuple[int, int], tuple[int, int]] = {}
        self._new: list[Entries] = []
        self._began = self._flushed = time.monotonic()
        self.damaged: list[str] = []

    def __len__(self) -> int:
        """Completions that are known."""
        mapped = 0 if self._index is None else self._index.table.size
        return mapped + self._table.size + len(self._waiting)

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

    def load(self, names: Sequence[str] | None = None, *, fresh: bool = False, is_first: bool = True) -> None:
        """Know what shards hold; a damaged one is reported, set aside and not used.

        Args:
            names: Shards that are wanted; None takes all that are there.
            fresh: Count what they hold as computed in this run.
            is_first: Whether this process is the first of its machine: it checks the index, and makes it if
                it is worth it. The others come after it, and map what it left.
        """
        wanted = self.names() if names is None else names
        if not fresh and not self._loaded:
            self._open_index(wanted, verify=is_first)
        self._merge(join(self._read(wanted)), fresh=fresh)
        mapped = 0 if self._index is None else self._index.table.size
        if is_first and not fresh and self._table.size >= max(INDEX_FROM, mapped // INDEX_SHARE):
            self._make_index()

    def _read(self, names: Sequence[str]) -> list[Entries]:
        parts = []
        for name in names:
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
        return parts

    @property
    def index_path(self) -> Path:
        """The file of this machine that holds, sorted, what the shards of this location hold."""
        place = self.location if "://" in self.location else str(Path(self.location).expanduser().resolve())
        name = hashlib.blake2b(place.encode(), digest_size=16).hexdigest()
        return cache_folder() / "reference_index" / f"{name}.safetensors"

    def _open_index(self, names: Sequence[str], *, verify: bool) -> None:
        """Map the index, if all shards that it was made of are wanted and are as they were."""
        if not self.index_path.is_file():
            return
        index = Index.open(self.index_path, verify=verify)
        if index is None:
            _log.warning("%s is torn or altered, and is made again from the shards", self.index_path)
            return
        now = self._folder.stamps()
        if set(index.covers) <= set(names) and all(now.get(n) == stamp for n, stamp in index.covers.items()):
            self._index = index
            self._loaded |= set(index.covers)

    def _make_index(self) -> None:
        """Write what is known as the index, and map that in its place."""
        stamps = self._folder.stamps()
        known = [] if self._index is None else [self._index.table.entries()]
        table, _ = Table.of(join([*known, self._table.entries()]))
        try:
            # Of a shard that was removed in between it could not be told any more whether it has changed.
            if self._loaded <= set(stamps):
                Index.write(self.index_path, table, covers={name: stamps[name] for name in self._loaded})
        except OSError:
            return  # without one, each process holds what it has read
        index = Index.open(self.index_path, verify=False)
        if index is not None and set(index.covers) == self._loaded:
            self._index = index
            self._table, _ = Table.of(Entries.empty())
            self._fresh = np.empty(0, np.bool_)

    def find(self, keys: KeyArray) -> Lookup:
        """Look completions up.

        Args:
            keys: See `lightning_dpo.reference.cache.keys`, (completions, 2).
        """
        # What was computed in float64 and is not written yet must not be rounded.
        dtype = self._new[0].logps.dtype if self._new else self._table.logps.dtype
        found = np.zeros(len(keys), np.bool_)
        logps, lengths, fresh = (
            np.zeros(len(keys), dtype),
            np.zeros(len(keys), np.int32),
            np.ones(len(keys), np.bool_),
        )
        for table in (self._table, *(() if self._index is None else (self._index.table,))):
            rows = np.flatnonzero(~found)
            positions = table.positions(keys if len(rows) == len(keys) else keys[rows])
            rows, at = rows[positions >= 0], positions[positions >= 0]
            found[rows], logps[rows], lengths[rows] = True, table.logps[at], table.lengths[at]
            fresh[rows] = self._fresh[at] if table is self._table else False
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
        known = self._table.size
        self._table, order = Table.of(join([self._table.entries(), entries]) if known else entries)
        self._fresh = np.concatenate([self._fresh, np.full(len(entries.keys), fresh)])[order]


def _words(key: npt.NDArray[np.uint64]) -> tuple[int, int]:
    return int(key[0]), int(key[1])
